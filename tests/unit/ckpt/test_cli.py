"""The ``ckpt`` command: what it prints, its JSON, its exit statuses, its errors."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.publishers import publish
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt import cli
from ckpt.about import package_version
from ckpt.catalog import list_steps
from ckpt.cli_commands import app
from ckpt.cli_tables import size_text, time_text
from ckpt.layout import MANIFEST
from ckpt.peft import WEIGHTS_NAME, is_lora_adapter_dir
from ckpt.storage import open_storage
from ckpt.types import BaseIdentity

SHARD = "shard-00001-of-00002.safetensors"


def ckpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ckpt_json(*arguments: object) -> Any:
    result = ckpt(*arguments, "--json")
    return json.loads(result.stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 10 and 20 of writer 1, of which 20 was abandoned by writer 2's 15; a version."""
    root = tmp_path / "root"
    storage = open_storage(root)
    tensors, export = tiny_adapter()
    for step in (10, 20):
        write_step(
            storage,
            step,
            tensors,
            world=2,
            export=export,
            policy_version=step * 2,
            base=BaseIdentity("Qwen/tiny", "ab" * 32),
        )
    publish(str(root), "run7", 3)
    write_writer(storage, 2, parent=(10, 1))
    write_step(storage, 15, tensors, world=2, epoch=2, export=export)
    return root


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 8
    path.write_bytes(data)


class TestLs:
    def test_table(self, root: Path) -> None:
        result = ckpt("ls", root)
        assert result.exit_code == 0
        lines = [line.split() for line in result.stdout.splitlines()]
        size = size_text(list_steps(open_storage(root))[0].bytes).split()
        assert ["10", "1", "committed", *size, "2", "12", "20"] in [line[:8] for line in lines]
        assert ["15", "2", "committed"] in [line[:3] for line in lines]
        assert ["20", "1", "abandoned"] in [line[:3] for line in lines]
        assert ["run7-v00000001", "committed", "3", "3", "bfloat16"] in [x[:5] for x in lines]

    def test_names_are_whole_on_a_narrow_terminal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")  # takes the output for a terminal
        monkeypatch.setenv("COLUMNS", "40")
        run = "a-run-" + "x" * 84
        publish(str(tmp_path), run, 7)
        result = ckpt("ls", tmp_path)
        assert f"{run}-v00000001" in result.stdout
        assert "bfloat16" in result.stdout

    def test_json(self, root: Path) -> None:
        shown = ckpt_json("ls", root)
        assert shown["url"] == str(root)
        assert [(s["step"], s["epoch"], s["state"]) for s in shown["steps"]] == [
            (10, 1, "committed"),
            (15, 2, "committed"),
            (20, 1, "abandoned"),
        ]
        first = shown["steps"][0]
        directory = root / first["path"]
        sizes = [f.stat().st_size for f in directory.iterdir() if f.name != MANIFEST]
        assert first["bytes"] == sum(sizes)
        assert first["files"] == len(sizes) == 3
        assert (first["tensors"], first["world_size"], first["policy_version"]) == (12, 2, 20)
        (version,) = shown["versions"]
        assert (version["name"], version["state"], version["step"]) == (
            "run7-v00000001",
            "committed",
            3,
        )
        assert len(version["adapter_sha256"]) == 64

    def test_damage_claims_and_nothing(self, root: Path, tmp_path: Path) -> None:
        (root / "steps" / "step-00000015.w0002" / SHARD).unlink()
        (root / "adapters" / "run7-v00000009.claim.json").write_text("x")
        result = ckpt("ls", root)
        assert result.exit_code == 0
        assert f"{SHARD} is missing" in result.stdout
        assert ["run7-v00000009", "claimed"] in [x.split()[:2] for x in result.stdout.splitlines()]
        shown = ckpt_json("ls", root)
        assert [step["state"] for step in shown["steps"]] == ["committed", "damaged", "abandoned"]
        assert "is missing" in shown["steps"][1]["problem"]
        (tmp_path / "empty").mkdir()
        assert "no steps and no versions in" in ckpt("ls", tmp_path / "empty").stdout


class TestInspect:
    def test_newest_step(self, root: Path) -> None:
        result = ckpt("inspect", root)
        assert result.exit_code == 0
        assert "15 (committed), by writer 2" in result.stdout
        assert SHARD in result.stdout
        assert "r=4, lora_alpha=4, on wo, wq" in result.stdout
        assert "4 x 12" in result.stdout
        assert "model.layers.0.wq.lora_a.weight" in result.stdout

    def test_a_step_by_number(self, root: Path) -> None:
        shown = ckpt_json("inspect", root, "--step", 10)
        assert shown["step"] == 10
        assert shown["base"] == {"name": "Qwen/tiny", "config_hash": "ab" * 32}
        assert shown["peft_config"]["r"] == 4
        assert len(shown["tensors"]) == 12
        named = {tensor["name"]: tensor for tensor in shown["tensors"]}
        assert named["model.layers.0.wq.lora_a.weight"] == {
            "name": "model.layers.0.wq.lora_a.weight",
            "dtype": "F32",
            "shape": [4, 12],
            "bytes": 192,
            "chunks": 2,
        }
        assert named["optim.layers.0.wq.lora_a.weight.step"]["shape"] == []

    def test_long_lists_are_cut_unless_told(self, tmp_path: Path) -> None:
        modules = tuple(f"layers.{index}.wq" for index in range(6))
        tensors, export = tiny_adapter(modules)
        write_step(open_storage(tmp_path), 1, tensors, export=export)
        assert "tensors (first 20 of 36)" in ckpt("inspect", tmp_path).stdout
        everything = ckpt("inspect", tmp_path, "--all").stdout
        assert all(name in everything for name in tensors)

    def test_abandoned_steps_need_their_writer(self, root: Path) -> None:
        result = ckpt("inspect", root, "--step", 20)
        assert result.exit_code == 2
        assert "was abandoned" in result.stderr
        assert "20 (abandoned)" in ckpt("inspect", root, "--step", 20, "--epoch", 1).stdout

    def test_version(self, root: Path) -> None:
        result = ckpt("inspect", root, "--version", "run7-v00000001")
        assert result.exit_code == 0
        assert "run7-v00000001 (committed)" in result.stdout
        shown = ckpt_json("inspect", root, "--version", "run7-v00000001")
        assert [file["name"] for file in shown["files"]] == ["adapter_config.json", WEIGHTS_NAME]
        (root / "adapters" / "run7-v00000001" / WEIGHTS_NAME).unlink()
        damaged = ckpt("inspect", root, "--version", "run7-v00000001")
        assert damaged.exit_code == 1
        assert "is missing" in damaged.stderr

    def test_step_without_adapter(self, tmp_path: Path) -> None:
        write_step(open_storage(tmp_path), 1, tiny_adapter()[0])
        assert "none: this step cannot be exported" in ckpt("inspect", tmp_path).stdout


class TestVerify:
    def test_everything_verifies(self, root: Path) -> None:
        result = ckpt("verify", root)
        assert result.exit_code == 0
        assert "4 checked: every byte verifies" in result.stdout
        shown = ckpt_json("verify", root)
        assert shown["ok"] is True
        assert all(check["problems"] == [] for check in shown["checked"])

    def test_a_flipped_bit_is_found_and_named(self, root: Path) -> None:
        flip(root / "steps" / "step-00000010.w0001" / SHARD)
        result = ckpt("verify", root)
        assert result.exit_code == 1
        (line,) = [line for line in result.stdout.splitlines() if SHARD in line]
        assert "are damaged: CRC32 is" in line
        assert line.endswith("(block 0)")
        assert "4 checked: 1 of them damaged" in result.stdout
        shown = ckpt_json("verify", root)
        assert shown["ok"] is False
        (damaged,) = [check for check in shown["checked"] if check["problems"]]
        assert damaged["path"] == "steps/step-00000010.w0001"
        assert damaged["state"] == "damaged"
        assert (damaged["problems"][0]["file"], damaged["problems"][0]["block"]) == (SHARD, 0)

    @pytest.mark.parametrize(
        "path",
        [
            f"steps/step-00000015.w0002/{MANIFEST}",
            "steps/step-00000020.w0001/state.json",
            f"adapters/run7-v00000001/{WEIGHTS_NAME}",
            "adapters/run7-v00000001/adapter_config.json",
            f"adapters/run7-v00000001/{MANIFEST}",
        ],
    )
    def test_every_kind_of_file_is_read(self, root: Path, path: str) -> None:
        flip(root / path)
        result = ckpt("verify", root)
        assert result.exit_code == 1
        assert Path(path).name in result.stdout

    def test_one_step_or_version_only(self, root: Path) -> None:
        flip(root / "steps" / "step-00000010.w0001" / SHARD)
        assert ckpt("verify", root, "--step", 15).exit_code == 0
        assert ckpt("verify", root, "--version", "run7-v00000001").exit_code == 0
        assert ckpt("verify", root, "--step", 10).exit_code == 1
        assert ckpt("verify", root, "--step", 10, "--epoch", 1).exit_code == 1
        missing = ckpt("verify", root, "--step", 10, "--epoch", 2)
        assert missing.exit_code == 2
        assert "no step 10" in missing.stderr

    def test_nothing_to_verify_is_not_fine(self, tmp_path: Path) -> None:
        result = ckpt("verify", tmp_path)
        assert result.exit_code == 2
        assert "nothing to verify" in result.stderr


class TestExport:
    def test_newest_step(self, root: Path, tmp_path: Path) -> None:
        result = ckpt("export", root, tmp_path / "out")
        assert result.exit_code == 0
        assert "step 15 (writer 2)" in result.stdout
        assert is_lora_adapter_dir(tmp_path / "out")

    def test_step_dtype_and_json(self, root: Path, tmp_path: Path) -> None:
        shown = ckpt_json("export", root, tmp_path / "out", "--step", 10, "--dtype", "float32")
        assert (shown["source"], shown["dtype"]) == ("step 10 (writer 1)", "float32")
        assert shown["out"] == str(tmp_path / "out")
        assert len(shown["adapter_sha256"]) == 64
        tensors = load_file(tmp_path / "out" / WEIGHTS_NAME)
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}

    def test_version(self, root: Path, tmp_path: Path) -> None:
        result = ckpt("export", root, tmp_path / "out", "--version", "run7-v00000001")
        assert result.exit_code == 0
        original = root / "adapters" / "run7-v00000001" / WEIGHTS_NAME
        assert (tmp_path / "out" / WEIGHTS_NAME).read_bytes() == original.read_bytes()

    def test_an_existing_output(self, root: Path, tmp_path: Path) -> None:
        assert ckpt("export", root, tmp_path / "out").exit_code == 0
        again = ckpt("export", root, tmp_path / "out")
        assert again.exit_code == 2
        assert "exists already; choose another name, or set overwrite" in again.stderr
        assert ckpt("export", root, tmp_path / "out", "--overwrite", "--step", 10).exit_code == 0

    def test_damage_ends_with_1_and_leaves_nothing(self, root: Path, tmp_path: Path) -> None:
        flip(root / "steps" / "step-00000010.w0001" / SHARD)
        result = ckpt("export", root, tmp_path / "out", "--step", 10)
        assert result.exit_code == 1
        assert SHARD in result.stderr
        assert not (tmp_path / "out").exists()


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "status", "message"),
        [
            (("ls", "{tmp}/gone"), 3, "no such directory: "),
            (("inspect", "{root}", "--step", "99"), 2, "no step 99 in"),
            (("inspect", "{root}", "--version", "latest"), 2, "no version 'latest' in"),
            (("inspect", "{root}", "--version", "../x"), 2, "version name must be"),
            (("verify", "{root}", "--step", "1", "--version", "a"), 2, "exclude each other"),
            (
                (
                    "export",
                    "{root}",
                    "{tmp}/o",
                    "--version",
                    "run7-v00000001",
                    "--dtype",
                    "float32",
                ),
                2,
                "leave --dtype out",
            ),
            (("ls", "nosuchscheme://x/y"), 2, "nosuchscheme"),
        ],
    )
    def test_one_line_and_a_status(
        self, root: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, message: str
    ) -> None:
        filled = [text.format(root=root, tmp=tmp_path) for text in arguments]
        result = ckpt(*filled)
        assert result.exit_code == status
        assert result.stdout == ""
        assert result.stderr.startswith("ckpt: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        shown = ckpt(*filled, "--json")
        assert shown.exit_code == status
        assert message in json.loads(shown.stdout)["error"]["message"]

    def test_version_of_the_program(self) -> None:
        result = ckpt("--version")
        assert result.exit_code == 0
        assert result.stdout == f"ckpt {package_version()}\n"

    def test_wrong_options_end_with_2(self, root: Path) -> None:
        assert ckpt("ls").exit_code == 2
        assert ckpt("nonsense").exit_code == 2
        assert ckpt("export", root, "x", "--dtype", "int8").exit_code == 2

    def test_a_damaged_writer_record_is_found_by_verify(self, root: Path) -> None:
        flip(root / "writers" / "0002.json")
        assert ckpt("ls", root).exit_code == 0
        result = ckpt("verify", root)
        assert result.exit_code == 1
        assert "damaged  writers/0002.json" in result.stdout
        checked = json.loads(ckpt("verify", root, "--json").stdout)["checked"]
        assert [item["path"] for item in checked if item["problems"]] == ["writers/0002.json"]

    @pytest.mark.s3
    def test_a_store_that_cannot_be_reached(self, s3: Any, monkeypatch: Any) -> None:
        result = ckpt("ls", "s3://no-such-bucket-at-all/x", "--endpoint-url", s3.endpoint_url)
        assert result.exit_code == 3
        assert "--endpoint-url" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("missing", ["typer", "rich"])
    def test_without_the_extra_one_line_says_what_to_install(
        self,
        missing: str,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        real: Callable[..., Any] = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.partition(".")[0] == missing:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            return real(name, *args, **kwargs)

        for name in list(sys.modules):
            if name.startswith("ckpt.cli_"):
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error == f"ckpt: the command line needs {missing}: pip install 'archon-lora[cli]'\n"


@pytest.mark.s3
def test_all_commands_on_s3(s3: Any, tmp_path: Path) -> None:
    url = s3.url("cli")
    tensors, export = tiny_adapter()
    write_step(open_storage(url, s3.storage_options), 5, tensors, world=2, export=export)
    publish(url, "run7", 1, s3.storage_options)
    endpoint = ("--endpoint-url", s3.endpoint_url)
    assert [step["state"] for step in ckpt_json("ls", url, *endpoint)["steps"]] == ["committed"]
    assert ckpt_json("inspect", url, *endpoint)["step"] == 5
    assert ckpt_json("verify", url, *endpoint)["ok"] is True
    assert ckpt("export", url, tmp_path / "out", *endpoint).exit_code == 0
    assert ckpt("export", url, s3.url("out"), *endpoint).exit_code == 0
    assert is_lora_adapter_dir(tmp_path / "out")


@pytest.mark.slow
def test_the_installed_command(root: Path) -> None:
    """The entry point itself, in a process of its own: status, output and a quiet stderr."""
    flip(root / "steps" / "step-00000010.w0001" / SHARD)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ckpt.cli", "verify", str(root), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
    assert done.stderr == ""
    done = subprocess.run(
        [*command[:3], "ls", "/no/such/root"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 3
    assert done.stderr.splitlines() == ["ckpt: no such directory: /no/such/root; check the path"]


def test_sizes_and_times_for_people() -> None:
    assert [size_text(n) for n in (0, 999, 1000, 81_260_000, 5 * 10**12, None)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "81.3 MB",
        "5.0 TB",
        "-",
    ]
    assert time_text("2026-01-31T12:00:00.123456Z") == "2026-01-31 12:00:00"
    assert time_text(None) == "-"
