"""Experts: their names, what is not adapted, and what is refused."""

import pytest
import torch

from archon_lora import LoRAConfig, apply_lora
from archon_lora.errors import AdapterMismatch, ModelLoadError, TargetError, UnmappedName
from archon_lora.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeModel, Qwen3MoeStateDictAdapter

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def build(**changes):
    config = Qwen3MoeConfig(**(SIZES | changes))
    torch.manual_seed(0)
    return Qwen3MoeModel(config), Qwen3MoeStateDictAdapter(config)


def expert(layer, index, projection):
    return f"model.layers.{layer}.mlp.experts.{index}.{projection}.weight"


def test_stacks_both_ways():
    model, adapter = build(mlp_only_layers=(1,))
    state = model.state_dict()
    assert state["layers.0.moe.experts.w2"].shape == (3, 32, 8)
    hf = adapter.to_hf(state)
    names = {expert(0, i, p) for i in range(3) for p in ("gate_proj", "up_proj", "down_proj")}
    assert {name for name in hf if ".experts." in name} == names
    assert torch.equal(hf[expert(0, 2, "up_proj")], state["layers.0.moe.experts.w3"][2])
    assert "model.layers.0.mlp.gate.weight" in hf
    assert "model.layers.1.mlp.gate_proj.weight" in hf
    back = adapter.from_hf(hf)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_missing_or_surplus_expert_is_named():
    model, adapter = build()
    hf = adapter.to_hf(model.state_dict())
    value = hf.pop(expert(1, 1, "gate_proj"))
    with pytest.raises(ModelLoadError, match=r"layers.1.moe.experts.w1 wants 3 .*experts\.1\.gate"):
        adapter.from_hf(hf)
    hf |= {expert(1, 1, "gate_proj"): value, expert(1, 3, "gate_proj"): value}
    with pytest.raises(ModelLoadError, match=r"experts\.3\.gate"):
        adapter.from_hf(hf)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.experts.gate_up_proj",
        "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight",
    ],
)
def test_other_forms_of_experts_and_adapters_on_them_are_named(name):
    _, adapter = build()
    with pytest.raises(UnmappedName, match="has no Archon name"):
        adapter.from_hf({name: torch.ones(1)})


def test_all_linear_is_attention_and_experts_without_the_router():
    model, adapter = build()
    record = apply_lora(model, LoRAConfig(rank=2), name_map=adapter.module_to_hf)
    wanted = {f"layers.{i}.attention.{m}" for i in (0, 1) for m in ("wq", "wk", "wv", "wo")}
    assert set(record.matched) == wanted
    stacks = {f"layers.{i}.moe.experts.{w}" for i in (0, 1) for w in ("w1", "w2", "w3")}
    assert set(record.experts) == stacks
    assert record.experts["layers.1.moe.experts.w3"] == tuple(
        f"model.layers.1.mlp.experts.{e}.up_proj" for e in range(3)
    )
    described = adapter.create_peft_adapter_config(LoRAConfig(rank=2), "base")
    assert described["target_modules"] == [
        *("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    ]


def test_a_router_is_adapted_if_asked():
    model, adapter = build(mlp_only_layers=(1,))
    config = LoRAConfig(rank=2, target_modules=["gate"])
    matched = apply_lora(model, config, name_map=adapter.module_to_hf).matched
    assert matched == {"layers.0.moe.router.gate": "model.layers.0.mlp.gate"}
    assert adapter.create_peft_adapter_config(config, "base")["target_modules"] == ["gate"]


@pytest.mark.parametrize(
    ("sizes", "targets", "message"),
    [
        ({"mlp_only_layers": (0, 1)}, "all-linear", "layers.0.mlp.gate_proj and 5 more, but besid"),
        (
            {"mlp_only_layers": (0,)},
            ["up_proj"],
            "selects model.layers.0.mlp.up_proj, but beside experts PEFT",
        ),
    ],
)
def test_what_takes_no_adapter_is_refused_with_the_reason(sizes, targets, message):
    model, adapter = build(**sizes)
    config = LoRAConfig(rank=2, target_modules=targets)
    with pytest.raises(TargetError, match=message):
        apply_lora(model, config, name_map=adapter.module_to_hf)
    assert not any(".lora_" in name for name in model.state_dict())
    with pytest.raises(TargetError, match="which cannot take an adapter"):
        adapter.create_peft_adapter_config(config, "base")


def test_experts_sharded_within_are_refused(monkeypatch):
    from archon_lora.models import expert_names

    _, adapter = build()
    stack = torch.ones(3, 8, 32)

    class Sharded(torch.Tensor):
        placements = "Shard(1)"

        def to_local(self):
            return torch.ones(3, 4, 32)

    monkeypatch.setattr(expert_names, "DTensor", Sharded)
    monkeypatch.setattr(
        expert_names, "local_slice", lambda _: (slice(0, 3), slice(0, 4), slice(0, 32))
    )
    with pytest.raises(AdapterMismatch, match=r"sharded within experts \(Shard"):
        adapter.convert_single_to_hf("layers.0.moe.experts.w1", stack.as_subclass(Sharded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok 4 must not exceed num_experts 3"),
        ({"num_experts": 0}, "num_experts must be an integer >= 1, got 0"),
        ({"num_local_experts": 7}, "num_experts is 3, but num_local_experts is 7"),
        ({"num_experts": None}, "lacks num_experts"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        ({"mlp_only_layers": ["a"]}, "mlp_only_layers must be an integer >= 0, got 'a'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer >= 1"),
    ],
)
def test_config_values(change, message):
    with pytest.raises(ModelLoadError, match=message):
        Qwen3MoeConfig.from_hf({"model_type": "qwen3_moe", **SIZES, **change})


def test_which_layers_have_experts():
    config = Qwen3MoeConfig(
        **(SIZES | {"num_hidden_layers": 6}), decoder_sparse_step=2, mlp_only_layers=(3,)
    )
    assert [config.sparse(layer) for layer in range(6)] == [0, 1, 0, 0, 0, 1]
