"""``ckpt versions`` and ``ckpt publish``: what they print and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.publishers import publish_to
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.consolidate import consolidate
from ckpt.holds import pin, take_lease
from ckpt.peft import WEIGHTS_NAME
from ckpt.storage import Storage, open_storage
from ckpt.versions import VersionEntry, find_version, read_version


def ckpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ckpt_json(*arguments: object) -> Any:
    result = ckpt(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def name(number: int) -> str:
    return f"run7-v{number:08d}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 0 to 2 of writer 1, of which writer 2 left step 2 behind; versions 1 to 5."""
    root = tmp_path / "root"
    storage = open_storage(root)
    for step in range(3):
        tensors, export = tiny_adapter(seed=step)
        write_step(storage, step, tensors, export=export, policy_version=step + 7)
    write_writer(storage, 2, parent=(1, 1))
    for seed in range(5):
        publish_to(storage, "run7", seed, epoch=2)
    return root


class TestVersions:
    def test_the_newest_are_read_and_shown_with_who_holds_them(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = open_storage(root)
        read: list[str] = []

        def find(storage: Storage, wanted: str) -> VersionEntry:
            read.append(wanted)
            return find_version(storage, wanted)

        monkeypatch.setattr("ckpt.cli_versions.find_version", find)
        take_lease(storage, name(4), "replica-1", 60)
        pin(storage, name(5))
        found = ckpt_json("versions", root, "--newest", 3)
        assert read == [name(3), name(4), name(5)]
        assert found["older"] == 2
        assert [(row["name"], row["state"], row["held"]) for row in found["versions"]] == [
            (name(3), "committed", None),
            (name(4), "committed", "in use by replica-1"),
            (name(5), "committed", "pinned"),
        ]
        assert found["versions"][0]["step"] == 2
        shown = ckpt("versions", root, "--newest", 3)
        assert shown.exit_code == 0
        assert "in use by replica-1" in shown.stdout
        assert "2 older" in shown.stdout
        assert name(2) not in shown.stdout

    def test_a_damaged_one_is_named(self, root: Path) -> None:
        open_storage(root).delete(f"adapters/{name(5)}/{WEIGHTS_NAME}")
        result = ckpt("versions", root)
        assert result.exit_code == 0
        assert "is missing" in result.stdout

    @pytest.mark.parametrize("floor", ["3", name(3)])
    def test_newer_than(self, root: Path, floor: str) -> None:
        publish_to(open_storage(root), "a", 0, epoch=2)
        found = ckpt_json("versions", root, "--newer-than", floor, "--run", "run7")
        assert [row["number"] for row in found["versions"]] == [4, 5]
        assert found["older"] == 0
        assert "no such versions" in ckpt("versions", root, "--newer-than", 5).stdout

    def test_wait(self, root: Path) -> None:
        found = ckpt_json("versions", root, "--newer-than", 4, "--wait", 30)
        assert [row["name"] for row in found["versions"]] == [name(5)]
        result = ckpt("versions", root, "--newer-than", 5, "--wait", 0)
        assert result.exit_code == 1
        assert "no version above 5" in result.stderr

    @pytest.mark.parametrize("floor", ["latest", "a-v00000001"])
    def test_what_it_refuses(self, root: Path, floor: str) -> None:
        result = ckpt("versions", root, "--newer-than", floor, "--run", "run7")
        assert result.exit_code == 2
        assert "the number or name of a version of run 'run7'" in result.stderr


class TestPublish:
    def test_a_step_becomes_the_next_version(self, root: Path, tmp_path: Path) -> None:
        found = ckpt_json("publish", root)
        assert found["version"] == name(6)
        assert (found["step"], found["policy_version"], found["dtype"]) == (1, 8, "bfloat16")
        manifest = read_version(open_storage(root), name(6))
        assert manifest.adapter_sha256 == found["adapter_sha256"]
        assert manifest.epoch == 2
        written = consolidate(root, 1, tmp_path / "out").written
        assert written.sha256 == manifest.adapter_sha256

    def test_options(self, root: Path) -> None:
        shown = ckpt("publish", root, "--step", 2, "--epoch", 1, "--dtype", "float32", "--run", "b")
        assert shown.exit_code == 0, shown.stderr
        assert "b-v00000001" in shown.stdout
        manifest = read_version(open_storage(root), "b-v00000001")
        assert (manifest.step, manifest.dtype) == (2, "float32")
        refused = ckpt("publish", root)
        assert refused.exit_code == 2
        assert "versions of several runs (b, run7): name a --run" in refused.stderr

    def test_the_first_version_of_a_root(self, tmp_path: Path) -> None:
        tensors, export = tiny_adapter()
        write_step(open_storage(tmp_path), 0, tensors, export=export)
        assert ckpt_json("publish", tmp_path)["version"] == "run-v00000001"

    def test_what_cannot_be_published(self, root: Path, tmp_path: Path) -> None:
        result = ckpt("publish", root, "--step", 2)
        assert (result.exit_code, "was abandoned" in result.stderr) == (2, True)
        assert ckpt("publish", root, "--step", 77).exit_code == 2
        assert ckpt("publish", root, "--run", "../x").exit_code == 2
        write_step(open_storage(tmp_path / "bare"), 0, tiny_adapter()[0])
        result = ckpt("publish", tmp_path / "bare")
        assert result.exit_code == 2
        assert "has no adapter export, so it cannot be published" in result.stderr
