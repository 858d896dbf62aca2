"""``ckpt sync`` on the command line: what is refused before anything is touched, and how."""

from __future__ import annotations

import builtins
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ckpt.cli_commands import app

ROOT = Path(__file__).parents[3]


def sync(tmp_path: Path, *options: str) -> tuple[int, str]:
    """Exit status and what was said, of a command that cannot work."""
    argv = ["sync", str(tmp_path / "root"), "--run", "run7", "--cache", str(tmp_path / "cache")]
    result = CliRunner().invoke(app, [*argv, "--engine", "vllm+http://127.0.0.1:1", *options])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--listen", "0.0.0.0:9101"), "give a token that callers must show"),
        (("--listen", "here"), "must be HOST:PORT"),
        (("--token-file", "/nonexistent"), "cannot read the token"),
        (("--run", "a/b"), "run name must be"),
        (("--holder", "a b"), "lease holder must be"),
        (("--max-size", "much"), "--max-size must be a size"),
        (("--max-size", "0"), "--max-size must be a size"),
        (("--slots", "1"), "slots"),
        (("--quorum", "2"), "quorum"),
        (("--poll", "0"), "poll_s must be"),
        (("--grace", "-1"), "grace"),
        (("--lease-ttl", "1"), "lease_ttl_s must be"),
        (("--engine", "http://127.0.0.1:2"), "vllm+http://host:port or sglang"),
        (("--engine", "vllm+http://127.0.0.1:1"), "each of them once"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_status_2(
    options: tuple[str, str], message: str, tmp_path: Path
) -> None:
    status, said = sync(tmp_path, *options)
    assert status == 2
    assert message in said
    assert "Traceback" not in said


def test_an_address_with_a_password_is_not_shown(tmp_path: Path) -> None:
    status, said = sync(tmp_path, "--engine", "http://me:hunter2@127.0.0.1:2")
    assert status == 2
    assert "hunter2" not in said


def test_a_cache_of_another_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".root").write_text("s3://bucket/other run7")
    status, said = sync(tmp_path)
    assert status == 2
    assert "holds versions of s3://bucket/other run7" in said


def test_without_httpx_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in ("drivers", "replica", "vllm", "sglang"):
        monkeypatch.delitem(sys.modules, f"ckpt.handoff.{name}", raising=False)
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == "httpx":
            raise ModuleNotFoundError("No module named 'httpx'", name="httpx")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    status, said = sync(tmp_path)
    assert status == 2
    assert "pip install 'archon-lora[cli,handoff]'" in said


def test_the_guide_names_every_option_and_every_variable() -> None:
    guide = (ROOT / "docs" / "sync.md").read_text(encoding="utf-8")
    command = (ROOT / "ckpt" / "cli_sync.py").read_text(encoding="utf-8")
    options = re.findall(r'typer\.Option\(\s*"(--[a-z-]+)"', command)
    assert len(options) > 10
    assert [option for option in options if f"`{option} " not in guide] == []
    resolve = (ROOT / "ckpt" / "handoff" / "resolve.py").read_text(encoding="utf-8")
    variables = re.findall(r'"(CKPT_VLLM_[A-Z_]+)"', resolve)
    assert len(variables) == 5
    assert [name for name in variables if f"| `{name}` |" not in guide] == []


def test_the_guide_names_only_metrics_that_there_are() -> None:
    from ckpt.handoff.sync_status import SyncStatus

    guide = (ROOT / "docs" / "sync.md").read_text(encoding="utf-8")
    source = (ROOT / "ckpt" / "handoff" / "sync_status.py").read_text(encoding="utf-8")
    named = set(re.findall(r"`ckpt_sync_([a-z_]+)`", guide))
    assert named
    assert [name for name in named if f'"{name}"' not in source] == []
    assert "ckpt_sync_ready 0" in SyncStatus("run7", "me", []).metrics()
