"""The README's example runs as printed, twice, and the second run goes on from the first.

Its commands run in test_docs.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"

pytestmark = pytest.mark.e2e


def example() -> str:
    """The one Python block of the README."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 1
    return str(blocks[0])


def run(folder: Path) -> str:
    """Run the example as a script in ``folder``; its standard output."""
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_is_about_twenty_lines() -> None:
    assert sum(bool(line.strip()) for line in example().splitlines()) <= 20


def test_example_runs_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example(), encoding="utf-8")
    assert run(tmp_path) == "went from step 0 to 9\n"
    assert run(tmp_path) == "went from step 10 to 19\n"

    adapters = sorted(p for p in (tmp_path / "runs/first/adapters").iterdir() if p.is_dir())
    assert len(adapters) == 4, "steps 4, 9, 14 and 19 were published"
    for folder in adapters:
        names = {p.name for p in folder.iterdir()}
        assert names == {"MANIFEST.json", "adapter_config.json", "adapter_model.safetensors"}
