"""``ckpt lint``: output, JSON, exit statuses."""

from __future__ import annotations

import json

import pytest
from support.lint_rows import BASE_CONFIG, ROWS, adapter
from support.publishers import publish
from typer.testing import CliRunner

from ckpt.cli_commands import app


def lint(*arguments):
    return CliRunner().invoke(app, ["lint", *map(str, arguments)])


@pytest.fixture
def base(tmp_path):
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(BASE_CONFIG))
    return directory


def test_a_portable_adapter_ends_with_0(tmp_path, base):
    directory = adapter().write(tmp_path / "run7-v00000001")
    result = lint(directory, "--base", base)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "peft: no objection",
        "vllm: no objection",
        "sglang: no objection",
    ]
    shown = json.loads(lint(directory, "--base", base / "config.json", "--json").stdout)
    assert shown == {
        "url": str(directory),
        "engines": ["peft", "vllm", "sglang"],
        "base": "qwen2",
        "values_read": True,
        "ok": True,
        "findings": [],
    }


def test_findings_end_with_1_and_say_who_does_what(tmp_path):
    directory = ROWS["no-b"].build().write(tmp_path / "adapter")
    result = lint(directory)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[-3:] == ["peft: silently wrong", "vllm: refused", "sglang: server dies"]
    (remedy,) = [line for line in lines if line.strip() == "export both factors of every module"]
    assert remedy == lines[3]
    assert lines[2].startswith("error    sglang  missing-b: 'base_model.model.model.layers.1.")
    shown = json.loads(lint(directory, "--json").stdout)
    assert shown["ok"] is False
    assert shown["findings"][0] == {
        "code": "missing-b",
        "engine": "peft",
        "severity": "error",
        "effect": "silently wrong",
        "where": "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight",
        "count": 1,
        "message": "'base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight' has no lora_B "
        "beside it: leaves the module as it is, with a warning",
        "remedy": "export both factors of every module",
    }


def test_one_engine_alone(tmp_path):
    directory = ROWS["only-q"].build().write(tmp_path / "adapter")
    assert lint(directory, "--for", "vllm", "--for", "peft").exit_code == 0
    assert lint(directory, "--for", "sglang").exit_code == 1
    assert lint(directory, "--for", "tgi").exit_code == 2


def test_warnings_end_with_0_unless_strict(tmp_path):
    directory = ROWS["unknown-field"].build().write(tmp_path / "adapter")
    result = lint(directory)
    assert result.exit_code == 0
    assert "peft: no objection (1 warning)" in result.stdout
    assert lint(directory, "--strict").exit_code == 1


def test_values_may_be_left_out(tmp_path):
    directory = ROWS["nan"].build().write(tmp_path / "adapter")
    assert lint(directory).exit_code == 1
    result = lint(directory, "--no-values")
    assert result.exit_code == 0
    assert "values were not looked at" in result.stdout


def test_limits(tmp_path):
    directory = adapter(rank=24).write(tmp_path / "adapter")
    assert "rank 24, limit 16" in lint(directory).stdout
    assert lint(directory, "--vllm-max-lora-rank", 32).exit_code == 0
    assert lint(directory, "--vllm-max-lora-rank", 32, "--sglang-max-lora-rank", 16).exit_code == 1
    wrong = lint(directory, "--vllm-max-lora-rank", 24)
    assert wrong.exit_code == 2
    assert "one of 1, 8, 16, 32" in wrong.stderr


def test_what_cannot_be_linted(tmp_path, base):
    publish(str(tmp_path / "root"), "run7")
    root = lint(tmp_path / "root")
    assert root.exit_code == 2
    assert "is the root of a run; name a version in it" in root.stderr
    version = tmp_path / "root" / "adapters" / "run7-v00000001"
    assert lint(version, "--for", "peft", "--for", "vllm").exit_code == 0
    assert lint(tmp_path / "gone").exit_code == 3
    (tmp_path / "empty").mkdir()
    assert lint(tmp_path / "empty").exit_code == 3
    directory = adapter().write(tmp_path / "adapter")
    assert lint(directory, "--base", tmp_path / "gone").exit_code == 3
    (base / "config.json").write_text("{")
    assert lint(directory, "--base", base).exit_code == 2
    (base / "config.json").write_text("[]")
    assert lint(directory, "--base", base).exit_code == 2
    (base / "config.json").write_text('{"hidden_size": 3}')
    assert "must name its model_type" in lint(directory, "--base", base).stderr


@pytest.mark.s3
def test_a_directory_on_s3(tmp_path, s3):
    from ckpt.storage import open_storage

    directory = ROWS["nan"].build().write(tmp_path / "adapter")
    url = s3.url("lint")
    store = open_storage(f"{url}/run7-v00000001")
    for path in directory.iterdir():
        store.put(path.name, path.read_bytes())
    result = lint(f"{url}/run7-v00000001", "--json")
    assert result.exit_code == 1
    assert {one["code"] for one in json.loads(result.stdout)["findings"]} == {"non-finite"}
    assert lint(f"{url}/run7-v00000009").exit_code == 3
