"""Saving and loading over ranks: the same bytes, the same bits, and failures that all hear of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ranks_engine
from support.engines import names_in, tiny_model
from support.ranks_engine import Call, run_all

from archon_lora.config import LoRAConfig
from archon_lora.engine import OptimizerConfig

pytestmark = pytest.mark.dist
RSLORA = {"lora": LoRAConfig(rank=3, alpha=7.0, use_rslora=True, rank_pattern={"q_proj": 2})}
BF16 = {"lora": LoRAConfig(rank=4, alpha=8.0, adapter_dtype="bfloat16"), "dtype": "bfloat16"}
DECAY = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=1, total_steps=9)
DROPOUT = {"lora": LoRAConfig(rank=4, alpha=8.0, dropout=0.2), "optimizer": DECAY}
PLAIN = {"lora": LoRAConfig(rank=3, alpha=6.0), "optimizer": DECAY}
FORMATS = ["hf", "dcp"]
CHANGES = [(2, 1), (1, 2), (2, 4), (4, 2)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list]:
    """Everything that runs on ranks, by name: what is saved first, then what loads it."""
    model = tiny_model(root / "model")
    (root / "file").write_text("")

    def resume(world: int, name: str, action: str, options: dict) -> dict[str, Call]:
        call = (ranks_engine.resume, (model, str(root / name), action, options))
        return {f"{name} {action} on {world}": call}

    def adapter(name: str, options: dict) -> tuple:
        return model, str(root / name), options

    one: dict[str, Call] = {
        "bad": (ranks_engine.save_adapter, adapter("bad", {})),
        "full 1": (ranks_engine.save_full, (model, str(root / "full-1"))),
        "full as it was": (ranks_engine.load_full, (model, model)),
        **resume(1, "from 1", "save", PLAIN),
    }
    four: dict[str, Call] = resume(4, "from 4", "save", PLAIN)
    found = run_all(1, one) | run_all(4, four)

    weights = root / "bad" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][-1, -1] = float("nan")
    save_file(tensors, weights)

    two: dict[str, Call] = {
        "rslora": (ranks_engine.save_adapter, adapter("rslora", RSLORA)),
        "full 2": (ranks_engine.save_full, (model, str(root / "full-2"))),
        "full loaded": (ranks_engine.load_full, (model, str(root / "full-2"))),
        "bad load": (ranks_engine.failing_load, (model, str(root / "bad"))),
        **resume(2, "from 2", "save", PLAIN),
        **resume(2, "from 1", "load", PLAIN),
        **resume(2, "from 4", "load", PLAIN),
    }
    for full in (False, True):
        out = str(root / "file" / "out")
        two[f"bad write {full}"] = (ranks_engine.failing_write, (model, out, full))
    for name in FORMATS:
        two |= resume(2, name, "save", {**DROPOUT, "format": name})
        two |= resume(2, name, "load", {**DROPOUT, "format": name})
    two["bf16 saved"] = (ranks_engine.save_adapter, adapter("bf16", BF16))
    two["bf16"] = (ranks_engine.load_adapter, adapter("bf16", BF16))
    found |= run_all(2, two)
    for world in (1, 4):
        load: Call = (ranks_engine.load_adapter, adapter("rslora", RSLORA))
        found |= run_all(
            world, {f"rslora on {world}": load, **resume(world, "from 2", "load", PLAIN)}
        )
    absent = {
        f"absent {what}": (ranks_engine.absent_rank, (model, str(root / what), what))
        for what in ("save", "load")
    }
    again = {
        f"again {members}": (
            ranks_engine.one_after_another,
            (model, str(root / f"again-{members}"), members),
        )
        for members in (3, 2)
    }
    return found | run_all(3, again | absent)


def _files(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in names_in(directory)}


def test_an_adapter_of_two_ranks_loads_on_four_and_on_one(results: dict[str, list]) -> None:
    (alone,) = results["rslora on 1"]
    for result in results["rslora on 4"]:
        assert result["sharded"]
        for name, value in alone["adapter"].items():
            assert torch.equal(result["adapter"][name], value), name
        torch.testing.assert_close(result["logits"], alone["logits"])


def test_bf16_adapters_cross_ranks_too(results: dict[str, list], root: Path) -> None:
    stored = load_file(root / "bf16" / "adapter_model.safetensors")
    first, second = results["bf16"]
    assert len(stored) == len(first["adapter"])
    for name, value in first["adapter"].items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, second["adapter"][name])
    assert all(t.dtype == torch.bfloat16 for t in stored.values())


def test_a_whole_model_has_the_same_bytes_from_any_number_of_ranks(
    results: dict[str, list], root: Path
) -> None:
    assert len(_files(root / "full-1")) > 3
    assert _files(root / "full-1") == _files(root / "full-2")
    (wanted,) = results["full as it was"]
    for got in results["full loaded"]:
        assert all(torch.equal(got[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("full", [False, True])
def test_a_write_that_fails_on_the_first_rank_fails_on_all(
    results: dict[str, list], full: bool
) -> None:
    first, second = results[f"bad write {full}"]
    assert first.startswith("StorageError: ")
    assert second.startswith("PeerFailed: ")
    assert "rank 0: StorageError" in second


def test_a_value_that_one_rank_sees_stops_all_ranks(results: dict[str, list]) -> None:
    (first, whole), (second, also) = results["bad load"]
    assert first.startswith("PeerFailed: ")
    assert "rank 1: AdapterMismatch" in first
    assert second.startswith("AdapterMismatch: ")
    assert whole
    assert also


@pytest.mark.parametrize("weight_format", FORMATS)
def test_two_ranks_go_on_bit_for_bit(results: dict[str, list], weight_format: str) -> None:
    saved, loaded = (results[f"{weight_format} {what} on 2"] for what in ("save", "load"))
    for before, after in zip(saved, loaded, strict=True):
        assert after["version"] == 2
        assert after["next"] == before["next"]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_another_number_of_ranks_goes_on_from_the_same_state(
    results: dict[str, list], before: int, after: int
) -> None:
    saved = results[f"from {before} save on {before}"][0]
    ranks = results[f"from {before} load on {after}"]
    assert len(ranks) == after
    for loaded in ranks:
        assert loaded["lr"] == saved["lr"]
        for part in ("adapter", "moments"):
            assert loaded[part].keys() == saved[part].keys()
            assert saved[part]
            for name, value in saved[part].items():
                assert torch.equal(loaded[part][name], value), name
        for ours, theirs in zip(saved["next"], loaded["next"], strict=True):
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-4)
            assert theirs["lr"] == ours["lr"]


@pytest.mark.parametrize("what", ["save", "load"])
def test_a_rank_that_never_comes_is_named_at_the_deadline(
    results: dict[str, list], what: str
) -> None:
    first, second, third = results[f"absent {what}"]
    assert third == "absent"
    assert "monitoredBarrier" in first
    assert "2" in first.split("monitoredBarrier", 1)[1]
    assert second != "no error"


@pytest.mark.parametrize("members", [2, 3])
def test_engines_and_saves_follow_each_other_on_a_part_of_the_world(
    results: dict[str, list], members: int
) -> None:
    first, *others = results[f"again {members}"]
    assert len(first) == 4
    assert first[:2] == first[2:]
    assert others == [first] * (members - 1) + [[]] * (3 - members)
