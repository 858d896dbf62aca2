"""``ckpt diff``: steps of any number of ranks, versions and bare adapters against each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.publishers import publish
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.storage import open_storage


def diff(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *(str(argument) for argument in arguments)])


def diff_json(*arguments: object) -> Any:
    return json.loads(diff(*arguments, "--json").stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 (one rank) and 2 (two ranks, the same values), 3 (one tensor changed)."""
    root = tmp_path / "root"
    storage = open_storage(root)
    tensors, export = tiny_adapter()
    write_step(storage, 1, tensors, export=export)
    write_step(storage, 2, tensors, export=export, world=2)
    changed = {**tensors, "model.layers.0.wq.lora_b.weight": torch.ones(10, 4)}
    write_step(storage, 3, changed, export=export, world=2)
    write_writer(storage, 1)
    for seed in (0, 0, 1):
        publish(str(root), "run7", seed)
    return root


def test_the_same_values_on_other_ranks_are_equal(root: Path) -> None:
    result = diff(root, 1, 2)
    assert result.exit_code == 0, result.output
    assert "tensors are equal" in result.stdout


def test_a_changed_tensor_is_named_with_how_far_it_went(root: Path) -> None:
    result = diff(root, 1, 3)
    assert result.exit_code == 1
    assert "1 of 12 tensors differ" in result.stdout
    assert "model.layers.0.wq.lora_b.weight" in result.stdout
    found = diff_json(root, "1.w1", "3.w1")
    (row,) = found["differences"]
    before = tiny_adapter()[0]["model.layers.0.wq.lora_b.weight"].double()
    assert row["kind"] == "other values"
    assert row["largest"] == pytest.approx(float((1 - before).abs().max()))
    assert row["relative"] == pytest.approx(float((1 - before).norm() / before.norm()))
    assert found["equal"] is False


def test_versions(root: Path) -> None:
    assert diff(root, "run7-v00000001", "run7-v00000002").exit_code == 0
    found = diff_json(root, "run7-v00000001", "run7-v00000003")
    assert {row["name"].rpartition(".lora_")[2] for row in found["differences"]} == {
        "A.weight", "B.weight",
    }  # fmt: skip
    assert found["differences"][0]["first"].startswith("BF16 [")


def test_a_version_and_a_bare_adapter(root: Path, tmp_path: Path) -> None:
    source = root / "adapters/run7-v00000001"
    bare = tmp_path / "bare"
    bare.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    (bare / "adapter_config.json").write_text(json.dumps({**config, "r": 99}))
    tensors = load_file(source / "adapter_model.safetensors")
    first, second, *rest = sorted(tensors)
    kept = {name: tensors[name] for name in rest}
    kept[first] = -tensors[first] * 0  # negative zeros would equal zeros: see below
    kept["base_model.model.more.lora_A.weight"] = torch.zeros(2, 2)
    kept[rest[0]] = tensors[rest[0]].float()
    save_file(kept, bare / "adapter_model.safetensors", {"format": "pt"})
    found = diff_json(root, "run7-v00000001", "--other", bare)
    assert found["fields"] == {"r": [config["r"], 99]}
    kinds = {row["name"]: row["kind"] for row in found["differences"]}
    assert kinds == {
        first: "other values",
        second: "only in the first",
        "base_model.model.more.lora_A.weight": "only in the second",
        rest[0]: "another dtype",
    }
    by_name = {row["name"]: row for row in found["differences"]}
    assert by_name[rest[0]]["relative"] == 0.0
    assert by_name[second]["relative"] is None


def test_a_negative_zero_and_a_nan_are_seen(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    zeros = torch.zeros(4)
    write_step(storage, 1, {"model.a": zeros, "model.n": zeros})
    write_step(storage, 2, {"model.a": -zeros, "model.n": zeros / 0})
    write_writer(storage, 1)
    kinds = {r["name"]: r["kind"] for r in diff_json(tmp_path, 1, 2)["differences"]}
    assert kinds["model.a"] == "other bits"
    assert "model.n" in kinds


def test_a_zero_that_changed_is_infinitely_far(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    write_step(storage, 1, {"model.a": torch.zeros(4), "model.b": torch.zeros(2, 3)})
    write_step(storage, 2, {"model.a": torch.ones(4), "model.b": torch.zeros(3, 2)})
    write_writer(storage, 1)
    rows = {row["name"]: row for row in diff_json(tmp_path, 1, 2)["differences"]}
    assert float(rows["model.a"]["relative"]) == math.inf
    assert rows["model.b"]["kind"] == "another shape"


def test_many_tensors_are_read_in_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = diff_json(root, 1, 3)
    monkeypatch.setattr("ckpt.diff.BATCH_BYTES", 100)
    assert diff_json(root, 1, 3) == whole


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("1",), 2, "name a second"),
        (("1", "9"), 2, "no step 9"),
        (("1", "run7-v00000009"), 2, "run7-v00000009"),
        (("1", "run7-v00000001"), 2, "no tensor is on both sides"),
        (("1", "--other", "/nowhere/at/all"), 3, "no such directory"),
    ],
)
def test_what_cannot_be_compared(
    root: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    result = diff(root, *arguments)
    assert result.exit_code == status, result.output
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_damage_is_found(root: Path) -> None:
    shard = next((root / "steps/step-00000002.w0001").glob("shard-00000-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    result = diff(root, 1, 2)
    assert result.exit_code == 1
    assert "ckpt verify" in result.stderr
