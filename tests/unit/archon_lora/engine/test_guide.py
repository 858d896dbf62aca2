"""The guide's example runs as it is printed, and so does what the text says about it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.engines import names_in

from archon_lora.models.tiny import write_tiny_qwen2

GUIDE = Path(__file__).parents[4] / "docs" / "engine.md"


def test_the_example_trains_saves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found
    monkeypatch.chdir(tmp_path)
    write_tiny_qwen2("tiny-qwen2")
    exec(compile(found[1], str(GUIDE), "exec"), {"__name__": "example"})
    first = capsys.readouterr().out.splitlines()
    assert len(first) == 5
    assert names_in(tmp_path / "saved") == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "train_state",
    ]
    load = re.search(r"with `(engine\.load\(.*?\))` after `initialize\(\)`", GUIDE.read_text())
    assert load
    again = re.sub(r"(engine\.initialize\(\).*\n)", rf"\1    {load[1]}\n", found[1])
    exec(compile(again, str(GUIDE), "exec"), {"__name__": "example"})
    second = capsys.readouterr().out.splitlines()
    assert float(eval(second[0])["loss"]) < float(eval(first[-1])["loss"])
