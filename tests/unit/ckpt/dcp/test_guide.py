"""The code in ``docs/dcp.md`` runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from ckpt.cli_commands import app

GUIDE = Path(__file__).parents[4] / "docs" / "dcp.md"


def test_the_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 7
    (tmp_path / "guide.py").write_text("\n".join(blocks), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "guide.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "never overwritten" in done.stdout
    for name in ("first", "step-100", "step-200", "step-300", "training", "imported"):
        result = CliRunner().invoke(app, ["verify", str(tmp_path / "runs/demo" / name)])
        assert (result.exit_code, "every byte verifies" in result.stdout) == (0, True), name
