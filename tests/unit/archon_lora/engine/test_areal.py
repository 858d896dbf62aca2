"""Parts of the AReaL plug-in that need no ranks: names, the guard, leases, proof."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import ranks_areal
from support.fake_engine import FakeEngine
from support.probed_versions import publish_for

from archon_lora import LoRAConfig, apply_lora
from archon_lora.engine.areal import HandOver
from archon_lora.engine.areal_names import GuardedNames, hf_module_names
from archon_lora.engine.areal_tensor_parallel import check_split, factors_in_plans
from archon_lora.engine.areal_update import LeasedVersions, _prove, hand_over
from archon_lora.errors import LoRAConfigError, UnmappedName
from archon_lora.targets import match_targets
from ckpt import TrainState
from ckpt.handoff import Registry
from ckpt.handoff.engine import ProofError

TABLE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "layers.{}.attention.wq.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.moe.router.gate.weight": "model.layers.{}.mlp.gate.weight",
    "layers.{}.moe.experts.w1": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "output.weight": "lm_head.weight",
}


def names_of(*, composite: bool = False) -> Any:
    def prefixed(key: str) -> str:
        return key.replace("model.", "model.language_model.", 1)

    adapter = SimpleNamespace(to_hf_map=TABLE)
    if composite:
        adapter._maybe_composite_hf_key = prefixed
    return hf_module_names(adapter)


def test_modules_are_called_as_their_weights_are() -> None:
    names = names_of()
    assert names("layers.3.attention.wq") == "model.layers.3.self_attn.q_proj"
    assert names("layers.3._checkpoint_wrapped_module.attention.wq") == names(
        "layers.3.attention.wq"
    )
    assert names("output") == "lm_head"
    assert names("layers.3.attention") is None
    assert names_of(composite=True)("layers.0.attention.wq") == (
        "model.language_model.layers.0.self_attn.q_proj"
    )


def test_all_linear_leaves_the_router_and_the_head_out() -> None:
    names = names_of()
    fqns = ["layers.0.attention.wq", "layers.0.moe.router.gate", "layers.0.moe.experts", "output"]
    hf = [names(fqn) or fqn for fqn in fqns]
    chosen = match_targets(
        LoRAConfig(), hf, linear_names={hf[0], hf[1], hf[3]}, output_names={"lm_head"}
    )
    assert chosen == ("model.layers.0.self_attn.q_proj",)


def test_a_model_without_huggingface_names_is_refused() -> None:
    with pytest.raises(LoRAConfigError, match="has no to_hf_map"):
        hf_module_names(None)


def test_the_guard_maps_the_base_and_never_drops_an_adapter() -> None:
    kept = SimpleNamespace(
        to_hf=dict, convert_single_to_hf=lambda n, t: [(n, t)], fqn_to_index_mapping=None
    )
    state = {"norm.weight": torch.ones(1), "layers.0.attention.wq.lora_a.weight": torch.ones(1)}
    assert list(GuardedNames(kept, lambda: True).to_hf(state)) == ["norm.weight"]
    guard = GuardedNames(kept, lambda: False)
    assert guard.fqn_to_index_mapping is None
    assert guard.convert_single_to_hf("norm.weight", torch.ones(1))
    for call in (
        lambda: guard.to_hf(state),
        lambda: guard.convert_single_to_hf("a.wq.lora_b.weight", torch.ones(1)),
    ):
        with pytest.raises(UnmappedName, match="belong"):
            call()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHON_LORA_ROOT", "s3://bucket/run-7")
    monkeypatch.setenv("ARCHON_LORA_ENGINE", "sglang")
    options = HandOver()
    assert (options.root, options.run, options.engine) == ("s3://bucket/run-7", "run", "sglang")
    with pytest.raises(LoRAConfigError, match="in_flight must be >= 2"):
        HandOver(in_flight=1)
    with pytest.raises(LoRAConfigError, match="engine must be"):
        HandOver(engine="tgi")
    with pytest.raises(LoRAConfigError, match="root is None"):
        HandOver(engine="vllm", root=None)


def test_leases_follow_the_newest_versions(tmp_path: Path) -> None:
    versions = [publish_for(tmp_path, "r", seed, None).name for seed in range(3)]
    copies = tmp_path / "copies"
    leased = LeasedVersions(Registry(tmp_path), keep=2, lease_s=60, copies=copies)
    for name in versions:
        leased.take(name)
        leased.registry.fetch(name, copies)
    assert sorted(path.name for path in copies.iterdir()) == versions[1:]
    held = {name: len(Registry(tmp_path).leases(name)) for name in versions}
    assert list(held.values()) == [0, 1, 1]
    leased.close()
    assert not any(Registry(tmp_path).leases(name) for name in versions)


def test_a_replica_proves_what_it_serves_under_areals_name(tmp_path: Path) -> None:
    with FakeEngine("vllm") as engine:
        right = publish_for(tmp_path, "r", 1, engine)
        other = publish_for(tmp_path, "r", 2, engine)
        directory = tmp_path / "adapters" / right.name
        address = engine.address.partition("+")[2].removeprefix("http://")
        with pytest.raises(ProofError, match="not on the replica's list"):
            _prove("vllm", address, right, directory, "lora-v1")
        from ckpt.handoff.drivers import open_engine

        driver = open_engine(engine.address)
        driver.load("lora-v1", str(directory))
        _prove("vllm", address, right, directory, "lora-v1")
        driver.load("lora-v2", str(directory))
        wrong = tmp_path / "adapters" / other.name
        with pytest.raises(ProofError):
            _prove("vllm", address, other, wrong, "lora-v2")
        driver.close()


@pytest.mark.s3
def test_a_version_on_s3_is_loaded_from_a_copy_on_the_node(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ranks_areal.SITE))
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})})
    apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    rollout = ranks_areal.Rollout()
    engine: Any = SimpleNamespace(
        cpu_group=None,
        config=SimpleNamespace(experiment_name="e", trial_name="t"),
        rollout_engine=rollout,
        manager=None,
        leased=None,
        handed_over=None,
        get_version=lambda: 0,
        train_state=lambda **parts: TrainState(model, **parts),
    )
    options = HandOver(root=s3.url("areal"), in_flight=2)
    meta = SimpleNamespace(type="disk", use_lora=True, lora_name="lora")
    meta.clear_checkpoint_after_load = True
    for version in range(3):
        meta.version, meta.path = version, str(tmp_path / f"weight_update_v{version}")
        rollout.version = 0  # the engine's, which the client's follows
        hand_over(engine, meta, options)
    names = [f"run-v{number:08}" for number in (1, 2, 3)]
    assert [Path(path).name for _, path, _, _ in rollout.loaded] == names
    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == names[1:]
    assert (tmp_path / "versions" / names[-1] / "adapter_model.safetensors").is_file()
    engine.leased.close()
    engine.manager.close()
    for name in [n for n in sys.modules if n.partition(".")[0] == "areal"]:
        monkeypatch.delitem(sys.modules, name)


def test_a_plan_that_is_not_known_and_a_layer_that_it_leaves_whole_are_refused() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})})
    apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    with pytest.raises(LoRAConfigError, match=r"does not split 'a\.q_proj'"):
        check_split(model)
    with pytest.raises(LoRAConfigError, match="no module of json has torch's"):  # noqa: SIM117
        with factors_in_plans(json.loads):
            pass


def test_areal_is_not_needed_to_import_the_plug_in() -> None:
    code = (
        "import sys, archon_lora.engine.areal, archon_lora.engine.areal_update\n"
        "assert not [n for n in sys.modules if n.partition('.')[0] == 'areal']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
