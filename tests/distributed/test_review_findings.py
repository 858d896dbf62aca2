"""One test for each finding of the review that an earlier LoRA attempt for this engine received.

The numbers are the review's; the last five tests are what it missed.
"""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import ranks_engine
from support.engines import make_engine, moved, names_in, tiny_model, train, weights_of
from support.ranks_engine import Call, run_all

from archon_lora.adapter import get_adapter_params
from archon_lora.config import LoRAConfig
from archon_lora.engine import (
    ArchonEngine,
    EngineConfig,
    SaveLoadMeta,
    load_lora_adapter,
    save_lora_adapter,
)
from archon_lora.errors import (
    AdapterMismatch,
    AdapterNotFound,
    LoRAConfigError,
    LoRANotEnabled,
    NoAdapterError,
)
from archon_lora.linear import LoRALinear
from archon_lora.models import get_model_spec, load_pretrained
from ckpt.errors import DamagedError

WEIGHTS = "adapter_model.safetensors"
SPLIT = {"lora": LoRAConfig(rank=3, alpha=7.0, target_modules=["q_proj", "down_proj"])}
DROPOUT = {"lora": LoRAConfig(rank=4, alpha=8.0, dropout=0.1)}
THREE = {"lora": LoRAConfig(rank=3, alpha=6.0)}

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saves")


@pytest.fixture(scope="module")
def ranks(model: str, root: Path) -> dict[str, list]:
    """Everything that runs on ranks, by name; three starts in all."""

    def saved(world: int) -> dict[str, Call]:
        call = (ranks_engine.save_adapter, (model, str(root / f"eleven-{world}"), SPLIT))
        return {f"save on {world}": call}

    resume = (model, str(root / "resumed"))
    one: dict[str, Call] = {
        **saved(1),
        "twelve": (ranks_engine.save_adapter, (model, str(root / "twelve"), {})),
        "gradients on 1": (ranks_engine.gradients, (model, THREE)),
    }
    two: dict[str, Call] = {
        **saved(2),
        **{
            f"busy {what}": (
                ranks_engine.while_default_group_is_busy,
                (model, str(root / f"busy-{what}"), what),
            )
            for what in ("save", "load")
        },
        "loaded": (ranks_engine.load_adapter, (model, str(root / "twelve"), {})),
        "resume save": (ranks_engine.resume, (*resume, "save", DROPOUT)),
        "resume load": (ranks_engine.resume, (*resume, "load", DROPOUT)),
        "gradients on 2": (ranks_engine.gradients, (model, THREE)),
    }
    return run_all(1, one) | run_all(2, two) | run_all(4, saved(4))


@pytest.fixture
def engine(model: str) -> Iterator[ArchonEngine]:
    with make_engine(model) as made:
        yield moved(made)


@pytest.fixture
def full_engine(model: str) -> Iterator[ArchonEngine]:
    with make_engine(model, lora=None) as made:
        yield made


def test_finding_01_alpha_is_validated_in_the_config() -> None:
    for bad in ("abc", "16", None, True, 0, -1.0, float("nan"), float("inf")):
        with pytest.raises(LoRAConfigError, match="alpha must be a finite number > 0, got"):
            LoRAConfig(rank=8, alpha=bad)
    with pytest.raises(LoRAConfigError, match="lora_alpha must be a finite number > 0, got 'abc'"):
        LoRAConfig.from_train_config({"use_lora": True, "lora_rank": 8, "lora_alpha": "abc"})


def test_finding_02_save_without_lora_names_the_setting(
    full_engine: ArchonEngine, tmp_path: Path
) -> None:
    with pytest.raises(LoRANotEnabled, match=r"LoRA is not enabled on this engine: set use_lora="):
        save_lora_adapter(full_engine, tmp_path)
    assert names_in(tmp_path) == []


def test_finding_03_load_without_lora_names_the_setting(
    full_engine: ArchonEngine, tmp_path: Path
) -> None:
    with pytest.raises(LoRANotEnabled, match=r"LoRA is not enabled on this engine: set use_lora="):
        load_lora_adapter(full_engine, tmp_path)


def test_finding_04_a_missing_file_is_named_by_its_full_path(
    engine: ArchonEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    for relative in ("there", "nowhere"):
        with pytest.raises(AdapterNotFound) as caught:
            load_lora_adapter(engine, relative)
        assert str(tmp_path / relative) in str(caught.value)
        for file in (WEIGHTS, "adapter_model.bin", "adapter_config.json"):
            assert file in str(caught.value)


def test_finding_05_a_mismatch_lists_missing_unexpected_and_shapes(
    engine: ArchonEngine, tmp_path: Path
) -> None:
    save_lora_adapter(engine, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    prefix = "base_model.model.model.layers.0"
    missing = f"{prefix}.self_attn.q_proj.lora_A.weight"
    misshapen = f"{prefix}.mlp.up_proj.lora_B.weight"
    unexpected = f"{prefix}.mlp.router.lora_A.weight"
    del tensors[missing]
    tensors[misshapen] = torch.zeros(5, 4)
    tensors[unexpected] = torch.zeros(4, 16)
    save_file(tensors, tmp_path / WEIGHTS)
    before = weights_of(engine)
    with pytest.raises(AdapterMismatch) as caught:
        load_lora_adapter(engine, tmp_path)
    text = str(caught.value)
    assert f"1 missing: {missing}" in text
    assert f"1 unexpected: {unexpected}" in text
    assert f"{misshapen}: the file has (5, 4), r=4 and the model want (24, 4)" in text
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_finding_06_save_leaves_the_default_group_alone(ranks: dict[str, list]) -> None:
    assert ranks["busy save"] == [12.0, 12.0]


def test_finding_07_load_leaves_the_default_group_alone(ranks: dict[str, list]) -> None:
    assert ranks["busy load"] == [12.0, 12.0]


def test_finding_08_with_optim_and_weight_format_are_honoured(
    engine: ArchonEngine, model: str, tmp_path: Path
) -> None:
    train(engine, 2)
    both = SaveLoadMeta(path=tmp_path / "both", with_optim=True)
    only = SaveLoadMeta(path=tmp_path / "only", with_optim=True, weight_format="dcp")
    engine.save(both)
    engine.save(only)
    assert names_in(tmp_path / "both") == ["adapter_config.json", WEIGHTS, "train_state"]
    assert names_in(tmp_path / "only") == ["train_state"]
    wanted = train(engine, 2, first=2)
    for meta in (both, only):
        with make_engine(model) as resumed:
            resumed.load(meta)
            assert train(resumed, 2, first=2) == wanted


def test_finding_09_lora_is_imported_only_inside_the_guard(model: str) -> None:
    script = (
        "import sys, torch\n"
        "from archon_lora.engine import ArchonEngine, EngineConfig\n"
        "engine = ArchonEngine(EngineConfig(path=sys.argv[1], device='cpu'))\n"
        "engine.initialize()\n"
        "loss = lambda logits, batch: logits.float().square().mean()\n"
        "engine.train_batch({'input_ids': torch.arange(8).view(2, 4)}, loss)\n"
        "engine.close()\n"
        "bad = ('linear', 'apply', 'adapter', 'peft', 'config', 'engine.lora_checkpoint')\n"
        "print([n for n in bad if f'archon_lora.{n}' in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, model],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_finding_10_the_config_is_one_class_at_module_level(engine: ArchonEngine) -> None:
    config = engine.lora_config
    assert type(config) is LoRAConfig
    assert LoRAConfig.__qualname__ == "LoRAConfig"
    assert pickle.loads(pickle.dumps(config)) == config
    # Absence is None, so there is no second switch that could disagree.
    for cls in (LoRAConfig, EngineConfig):
        assert not {"enabled", "use_lora"} & {field.name for field in dataclasses.fields(cls)}
    assert EngineConfig(path="model").lora is None


def test_finding_11_save_gathers_dtensor_shards(ranks: dict[str, list], root: Path) -> None:
    files = {}
    for world in (1, 2, 4):
        out = root / f"eleven-{world}"
        files[world] = {name: (out / name).read_bytes() for name in names_in(out)}
        shards = ranks[f"save on {world}"]
        assert any("dim=1" in shard for shard in shards[0]), "A is split by columns here"
        assert any("dim=0" in shard for shard in shards[0])
    assert files[1] == files[2] == files[4]
    assert files[1].keys() == {"adapter_config.json", WEIGHTS}


def test_finding_12_load_distributes_onto_placements(
    ranks: dict[str, list], model: str, root: Path
) -> None:
    stored = load_file(root / "twelve" / WEIGHTS)
    names = get_model_spec("qwen2")
    adapter = names.state_dict_adapter_cls(names.config_cls.from_hf(model))
    wanted = adapter.from_hf(stored)
    for result in ranks["loaded"]:
        assert result["sharded"]
        assert result["adapter"].keys() == wanted.keys()
        for name, value in wanted.items():
            assert torch.equal(result["adapter"][name], value), name
            assert value.any() or "lora_b" not in name


def test_finding_13_the_spelling_is_told_right(engine: ArchonEngine, tmp_path: Path) -> None:
    save_lora_adapter(engine, tmp_path)
    stored = load_file(tmp_path / WEIGHTS).keys()
    live = get_adapter_params(engine.model).keys()
    assert {key.rsplit(".", 2)[1] for key in stored} == {"lora_A", "lora_B"}
    assert {name.rsplit(".", 2)[1] for name in live} == {"lora_a", "lora_b"}
    converted = {engine.state_dict_adapter.from_hf_name(key) for key in stored}
    assert converted == set(live)
    text = " ".join((LoRALinear.__doc__ or "").split())
    assert "``lora_b``, as in torchtune and Archon; PEFT's spelling is ``lora_A``" in text


def test_unflagged_1_an_engine_without_adapter_parameters_is_an_error(
    model: str, tmp_path: Path
) -> None:
    bare, _ = load_pretrained(model)

    class Engine:
        cpu_group = None
        model_parts = (bare,)
        lora_config = LoRAConfig(rank=2)
        config = EngineConfig(path=model)

    with pytest.raises(NoAdapterError, match="no adapter parameters, so there is nothing to save"):
        save_lora_adapter(Engine(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_unflagged_2_a_pickle_in_a_legacy_bin_never_runs(
    engine: ArchonEngine, tmp_path: Path
) -> None:
    save_lora_adapter(engine, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    marker = tmp_path / "executed"
    torch.save({**tensors, "x": _Payload(marker)}, tmp_path / "adapter_model.bin")
    with pytest.raises(DamagedError, match="not a plain dictionary of tensors"):
        load_lora_adapter(engine, tmp_path)
    assert not marker.exists()
    # The payload does run where pickles are let in, so the test would notice.
    torch.load(tmp_path / "adapter_model.bin", weights_only=False)
    assert marker.exists()


def test_unflagged_3_load_never_falls_through_to_another_kind(
    engine: ArchonEngine, model: str
) -> None:
    before = weights_of(engine)
    with pytest.raises(AdapterNotFound, match="no LoRA adapter at"):
        engine.load(SaveLoadMeta(path=model))
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_unflagged_4_ranks_save_load_and_resume_together(ranks: dict[str, list]) -> None:
    for before, after in zip(ranks["resume save"], ranks["resume load"], strict=True):
        assert after["next"] == before["next"]
        assert len(after["moments"]) > 0


def test_unflagged_5_all_layers_forward_and_backward_in_parallel(ranks: dict[str, list]) -> None:
    (alone,) = ranks["gradients on 1"]
    assert len({name.split(".")[1] for name in alone["grads"]}) == 2, "both layers have gradients"
    for result in ranks["gradients on 2"]:
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        torch.testing.assert_close(result["logits"], alone["logits"])
        assert result["grads"].keys() == alone["grads"].keys()
        for name, grad in alone["grads"].items():
            assert grad.any(), name
            torch.testing.assert_close(result["grads"][name], grad, rtol=1e-4, atol=1e-6)
