"""LoRA on stacked experts: the same numbers as one LoRALinear for each, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from archon_lora import (
    AdapterMismatch,
    LoRAConfig,
    LoRAConfigError,
    NoAdapterError,
    TargetError,
    adapter_mode,
    add_adapter,
    apply_lora,
    copy_adapter,
    disable_adapter,
    enable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    initialise_adapters,
    iter_merged_weights,
    load_adapter_tensors,
    peft_export,
    remove_adapter,
)
from archon_lora.experts import LoRAGroupedExperts
from archon_lora.grouped import grouped_linear
from archon_lora.linear import LoRALinear
from archon_lora.models.experts import GroupedExperts
from archon_lora.stacked import FUSED

E, D, F = 3, 8, 4
COUNTS = torch.tensor([4, 0, 5])
EXPERTS = ["gate_proj", "up_proj", "down_proj"]
HF = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D, bias=False, dtype=dtype)
        self.experts = GroupedExperts(E, D, F).to(dtype)


def block(dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(0)
    made = Block(dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return made


def adapted(config: LoRAConfig, dtype: torch.dtype = torch.float32) -> Block:
    made = block(dtype)
    apply_lora(made, config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(get_adapter_params(made).items()):
            if "lora_b" in name:
                torch.manual_seed(index)
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return made


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(int(COUNTS.sum()), D, generator=torch.Generator().manual_seed(3)).to(dtype)


def one_by_one(
    experts: LoRAGroupedExperts, config: LoRAConfig
) -> tuple[list[dict[str, LoRALinear]], nn.ParameterList]:
    """A LoRALinear for each expert and projection, with the stacks' own values."""
    layers, factors = [], nn.ParameterList()
    for index in range(E):
        made = {}
        for stack, hf in HF.items():
            out, width = experts.get_parameter(stack).shape[1:]
            linear = nn.Linear(width, out, bias=False, dtype=experts.w1.dtype)
            layer = LoRALinear.from_linear(
                linear,
                rank=config.rank_for(hf),
                alpha=config.alpha_for(hf),
                use_rslora=config.use_rslora,
                adapter_dtype=config.adapter_dtype,
            )
            with torch.no_grad():
                layer.weight.copy_(experts.get_parameter(stack)[index])
                layer.lora_a.weight.copy_(experts.get_parameter(f"{stack}_lora_a")[index])
                layer.lora_b.weight.copy_(experts.get_parameter(f"{stack}_lora_b")[index])
            factors += [layer.lora_a.weight, layer.lora_b.weight]
            made[stack] = layer
        layers.append(made)
    return layers, factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [{"rank": 4}, {"rank": 3, "use_rslora": True}, {"rank": 2, "rank_pattern": {"up_proj": 4}}],
)
def test_forward_and_gradients_are_those_of_one_layer_for_each_expert(settings, dtype):
    config = LoRAConfig(alpha=6, **settings)
    model = adapted(config, dtype)
    layers, factors = one_by_one(model.experts, config)
    x = rows(dtype)
    ours = model.experts(x, COUNTS)
    parts = []
    for part, layer in zip(x.split(COUNTS.tolist()), layers, strict=True):
        parts.append(layer["w2"](functional.silu(layer["w1"](part)) * layer["w3"](part)))
    theirs = torch.cat(parts)
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)

    weight = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    position = 0
    for index in range(E):
        for stack in HF:
            for side in "ab":
                grad = model.experts.get_parameter(f"{stack}_lora_{side}").grad
                assert grad is not None
                assert grad.dtype == torch.float32
                expected = factors[position].grad
                position += 1
                torch.testing.assert_close(grad[index], expected, rtol=1e-5, atol=1e-6)
                assert bool(grad[index].any()) == (index != 1), "expert 1 has no rows"


def test_without_any_rows_every_parameter_gets_a_gradient_of_zeros():
    model = adapted(LoRAConfig(rank=2))
    out = model.experts(rows()[:0], torch.zeros(E, dtype=torch.long))
    assert out.shape == (0, D)
    out.sum().backward()
    for name, parameter in get_adapter_params(model).items():
        if "experts" in name:
            assert parameter.grad is not None
            assert not parameter.grad.any()


def test_the_kernel_and_the_loop_give_the_same_bits(monkeypatch):
    x, weight = rows(), torch.randn(E, F, D)
    used = []
    kernel = functional.grouped_mm

    def watched(*args, **kwargs):
        used.append(args[0].shape)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(functional, "grouped_mm", watched)
    fast = grouped_linear(x, weight, COUNTS)
    assert used
    monkeypatch.setattr("archon_lora.grouped._takes_kernel", lambda *_: False)
    assert torch.equal(fast, grouped_linear(x, weight, COUNTS))


# After a graph break torch's tracer asks each input for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_experts_compute_the_same():
    model = adapted(LoRAConfig(rank=4))
    wanted = model.experts(rows(), COUNTS)
    model.experts.compile(backend="aot_eager")
    found = model.experts(rows(), COUNTS)
    torch.testing.assert_close(found, wanted)
    found.square().sum().backward()
    assert model.experts.w1_lora_a.grad.any()


def test_the_first_output_is_the_base_and_disabling_restores_it():
    base, config = block(), LoRAConfig(rank=2)
    fresh = block()
    apply_lora(fresh, config)
    assert torch.equal(fresh.experts(rows(), COUNTS), base.experts(rows(), COUNTS))
    model = adapted(config)
    assert not torch.equal(model.experts(rows(), COUNTS), base.experts(rows(), COUNTS))
    disable_adapter(model)
    assert torch.equal(model.experts(rows(), COUNTS), base.experts(rows(), COUNTS))
    enable_adapter(model)
    assert not torch.equal(model.experts(rows(), COUNTS), base.experts(rows(), COUNTS))


def test_initial_values_come_from_the_name_and_have_the_range_of_one_experts_input():
    model = block()
    apply_lora(model, LoRAConfig(rank=16))
    a = model.experts.w1_lora_a
    assert a.shape == (E, 16, D)
    bound = D**-0.5
    assert bound * 0.9 < a.abs().max() <= bound  # fan-in of the stack would make it 4 times smaller
    assert not model.experts.w1_lora_b.any()
    assert not torch.equal(a[0], a[1])
    with torch.device("meta"):
        again = Block()
    apply_lora(again, LoRAConfig(rank=16))
    with pytest.raises(NoAdapterError, match="to_empty"):
        initialise_adapters(again)
    again.to_empty(device="cpu")
    initialise_adapters(again)
    assert torch.equal(again.experts.w1_lora_a, a)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == list(
        get_adapter_params(again)
    )


def test_merged_stacks_compute_what_the_adapter_computes_and_the_base_stays():
    model = adapted(LoRAConfig(rank=2, alpha=6))
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = dict(iter_merged_weights(model))
    assert set(merged) == {"q_proj.weight", "experts.w1", "experts.w2", "experts.w3"}
    plain = block()
    plain.load_state_dict({**plain.state_dict(), **merged})
    torch.testing.assert_close(plain.experts(rows(), COUNTS), model.experts(rows(), COUNTS))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_copy_of_the_model_has_adapters_of_its_own():
    model = adapted(LoRAConfig(rank=2))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.experts.w1_lora_b.zero_()
    assert model.experts.w1_lora_b.any()
    assert peft_export(other)["rules"] == peft_export(model)["rules"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"target_modules": ["experts.1.up_proj"]},
            TargetError,
            "1 of 3 experts and not experts.0",
        ),
        (
            {"rank_pattern": {r"experts\.2\.up_proj": 4}},
            LoRAConfigError,
            "experts.2.up_proj rank 4",
        ),
        ({"alpha_pattern": {r"experts\.0\.\w+": 4}}, LoRAConfigError, "rank 2 and alpha 4"),
        ({"exclude_modules": ["experts.0.down_proj"]}, TargetError, "2 of 3 experts"),
    ],
)
def test_settings_of_single_experts_are_refused(settings, error, message):
    model = block()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        apply_lora(model, LoRAConfig(rank=2, **settings))
    assert list(model.state_dict()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_experts_of_another_form_or_with_hooks_are_refused():
    model = block()
    model.experts.register_parameter("bias", nn.Parameter(torch.ones(1)))
    with pytest.raises(TargetError, match="three stacks"):
        apply_lora(model, LoRAConfig(rank=2))
    model = block()
    model.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(TargetError, match="hooks"):
        apply_lora(model, LoRAConfig(rank=2))


def test_export_takes_experts_apart_and_a_load_puts_them_together():
    config = LoRAConfig(rank=2, alpha=6, rank_pattern={"up_proj": 4})
    model = adapted(config)
    export = peft_export(model)
    state = get_adapter_state_dict(model, full=True)
    keys = {rule["key"] for rule in export["rules"]}
    assert "base_model.model.experts.2.up_proj.lora_A.weight" in keys
    assert len(keys) == 2 * (1 + 3 * E)
    tensors = {}
    for rule in export["rules"]:
        value = state[rule["source"]]
        value = value if rule["index"] is None else value[rule["index"]]
        if rule["pad_dim"] is not None:
            pad = rule["pad_to"] - value.shape[rule["pad_dim"]]
            value = functional.pad(value, (0, 0, 0, pad) if rule["pad_dim"] == 0 else (0, pad))
        tensors[rule["key"]] = value * rule["scale"]
    again = block()
    apply_lora(again, config)
    load_adapter_tensors(again, tensors, export["peft_config"])
    for name, value in get_adapter_state_dict(again).items():
        torch.testing.assert_close(value, state[name])

    del tensors["base_model.model.experts.1.up_proj.lora_B.weight"]
    with pytest.raises(AdapterMismatch, match=r"1 missing: base_model.model.experts.1.up_proj"):
        load_adapter_tensors(again, tensors, export["peft_config"])


def test_several_adapters_over_the_same_experts():
    model = adapted(LoRAConfig(rank=2, alpha=4))
    config = LoRAConfig(rank=2, alpha=4, target_modules=["gate_proj", "up_proj", "q_proj"])
    add_adapter(model, "reference", config, trainable=False)
    add_adapter(model, "other", LoRAConfig(rank=3, target_modules=["down_proj"]))
    base, x = block().experts, rows()
    plain, policy = base(x, COUNTS), model.experts(x, COUNTS)
    with adapter_mode(model, "reference"):
        assert torch.equal(model.experts(x, COUNTS), plain)  # its B is zero
        with adapter_mode(model, "base"):
            assert torch.equal(model.experts(x, COUNTS), plain)
    assert torch.equal(model.experts(x, COUNTS), policy)
    with torch.no_grad():
        model.experts.adapters["other"].w2_lora_b.fill_(0.1)
    with adapter_mode(model, "other"):
        assert not torch.equal(model.experts(x, COUNTS), plain)
        assert not torch.equal(model.experts(x, COUNTS), policy)
    trained = list(get_adapter_params(model))
    assert "experts.adapters.other.w2_lora_a" in trained
    assert not any("reference" in name for name in trained)
    held = get_adapter_params(model, adapter="reference")
    assert "experts.adapters.reference.w3_lora_b" in held
    assert not any(parameter.requires_grad for parameter in held.values())

    keys = {rule["key"] for rule in peft_export(model, adapter="other")["rules"]}
    assert keys == {
        f"base_model.model.experts.{e}.down_proj.lora_{side}.weight"
        for e in range(E)
        for side in "AB"
    }
    merged = dict(iter_merged_weights(model, adapter="other"))
    assert set(merged) == {"experts.w2"}
    with pytest.raises(AdapterMismatch, match="only one of them has"):
        copy_adapter(model, "default", "reference")
    remove_adapter(model, "reference")
    remove_adapter(model, "other")
    assert not any("adapters" in name for name in model.state_dict())
    assert torch.equal(model.experts(x, COUNTS), policy)


def test_experts_that_only_a_further_adapter_is_for():
    model = block()
    apply_lora(model, LoRAConfig(rank=2, target_modules=["q_proj"]))
    add_adapter(model, "other", LoRAConfig(rank=2, target_modules=EXPERTS))
    x, plain = rows(), block().experts(rows(), COUNTS)
    assert torch.equal(model.experts(x, COUNTS), plain)
    with torch.no_grad():
        for name, parameter in get_adapter_params(model, adapter="other").items():
            parameter.fill_(0.1 if "lora_b" in name else 0.2)
    with adapter_mode(model, "other"):
        assert not torch.equal(model.experts(x, COUNTS), plain)
    with pytest.raises(LoRAConfigError, match="need one rank"):
        add_adapter(model, "third", LoRAConfig(rank_pattern={r"experts\.1\.up_proj": 1}))


def stacked_file(rank: int, *, apart: bool) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """An adapter on the stacks as PEFT writes it, by its published formula."""
    torch.manual_seed(9)
    up_a, up_b = torch.randn(E, rank, D), torch.randn(E, 2 * F, rank)
    if apart:
        up_b[:, :F, rank // 2 :] = 0
        up_b[:, F:, : rank // 2] = 0
    down_a, down_b = torch.randn(E, rank, F), torch.randn(E, D, rank)
    prefix = "base_model.model.experts."
    tensors = {
        f"{prefix}base_layer.lora_A.weight": up_a.flatten(0, 1),
        f"{prefix}base_layer.lora_B.weight": up_b.permute(1, 2, 0).flatten(1),
        f"{prefix}lora_A.weight": down_a.flatten(0, 1),
        f"{prefix}lora_B.weight": down_b.permute(1, 2, 0).flatten(1),
    }
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": [],
        "target_parameters": [f"experts.{FUSED}", "experts.down_proj"],
        "peft_version": "0.21.2",
    }
    return tensors, config


@pytest.mark.parametrize("apart", [True, False])
def test_stacks_of_peft_are_read_exactly(apart):
    tensors, config = stacked_file(4, apart=apart)
    half = dict.fromkeys(("gate_proj", "up_proj"), 2) if apart else {}
    lora = LoRAConfig(rank=4, alpha=4, target_modules=EXPERTS, rank_pattern=half)
    model = block()
    apply_lora(model, lora)
    load_adapter_tensors(model, tensors, config)
    a = tensors["base_model.model.experts.base_layer.lora_A.weight"].view(E, 4, D)
    b = tensors["base_model.model.experts.base_layer.lora_B.weight"].view(2 * F, 4, E)
    fused = torch.einsum("ore,eri->eoi", b, a)
    base = block().experts
    for name, merged in iter_merged_weights(model):
        stack = name.rpartition(".")[2]
        if stack == "w2":
            continue
        delta = fused[:, :F] if stack == "w1" else fused[:, F:]
        scale = 2.0 if apart else 1.0  # alpha 4 over rank 2 was folded into B
        torch.testing.assert_close(merged, base.get_parameter(stack) + delta)
        assert scale == model.experts.scalings[stack]


@pytest.mark.parametrize(
    ("rank", "changes", "error", "message"),
    [
        (2, {}, AdapterMismatch, "mixes the ranks of gate and up projections"),
        (3, {}, AdapterMismatch, "set rank to 4"),
        (4, {"peft_version": "0.18.0"}, LoRAConfigError, "before 0.19.1"),
        (4, {"peft_version": None}, LoRAConfigError, "before 0.19.1"),
        (4, {"target_parameters": ["q_proj.weight"]}, LoRAConfigError, "'q_proj.weight' is not"),
        (4, {"r": 5}, AdapterMismatch, "rank 5 of the stack"),
    ],
)
def test_stacks_that_cannot_be_read_exactly_are_refused(rank, changes, error, message):
    tensors, config = stacked_file(4, apart=False)
    model = block()
    pattern = {"down_proj": 4}
    apply_lora(model, LoRAConfig(rank=rank, target_modules=EXPERTS, rank_pattern=pattern))
    before = get_adapter_state_dict(model, full=True)
    with pytest.raises(error, match=message):
        load_adapter_tensors(model, tensors, config | changes)
    assert all(torch.equal(v, before[n]) for n, v in get_adapter_state_dict(model).items())
