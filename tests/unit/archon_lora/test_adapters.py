"""Several adapters over one base: each computes, trains, is saved and exported by itself."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ckpt
from archon_lora import (
    AdapterMismatch,
    LoRAConfig,
    LoRAConfigError,
    LoRALinear,
    LoRANotEnabled,
    NoAdapterError,
    TargetError,
    adapter_mode,
    adapter_names,
    add_adapter,
    apply_lora,
    copy_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    initialise_adapters,
    iter_merged_weights,
    load_adapter_tensors,
    peft_export,
    remove_adapter,
    set_active,
    set_trainable_params,
)
from ckpt import CheckpointManager, TrainState
from ckpt.errors import StateError
from ckpt.peft import read_adapter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(6, 6)
        self.o_proj = nn.Linear(6, 6)
        self.down_proj = nn.Linear(6, 8, bias=False)
        self.lm_head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.down_proj(self.gate_proj(x) * self.o_proj(x))))


POLICY = LoRAConfig(rank=4, alpha=8, target_modules=["gate_proj", "o_proj"])
WIDE = LoRAConfig(rank=2, alpha=6, target_modules=["o_proj", "down_proj"], use_rslora=True)
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


def adapted(*, seed: int = 5) -> Net:
    """Three adapters: the policy, another that trains, and a frozen reference like the policy."""
    torch.manual_seed(0)
    net = Net()
    apply_lora(net, POLICY)
    add_adapter(net, "wide", WIDE)
    add_adapter(net, "reference", POLICY, trainable=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in get_adapter_params(net, frozen=True).values():
            parameter.normal_(generator=generator)
    return net


def values(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in get_adapter_params(net, frozen=True).items()}


def test_names_targets_and_who_trains() -> None:
    net = adapted()
    assert adapter_names(net) == ("default", "wide", "reference")
    wide = ["o_proj.adapters.wide", "down_proj.adapters.wide"]
    policy = ["gate_proj", "o_proj"]
    frozen = [f"{name}.adapters.reference" for name in policy]

    def factors(places: list[str]) -> set[str]:
        return {f"{place}.lora_{f}.weight" for place in places for f in "ab"}

    assert set(get_adapter_params(net)) == factors(policy + wide)
    assert set(get_adapter_params(net, adapter="wide")) == factors(wide)
    assert set(get_adapter_params(net, adapter="reference")) == factors(frozen)
    assert set(get_adapter_params(net, frozen=True)) == factors(policy + wide + frozen)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == factors(policy + wide)
    set_trainable_params(net, get_adapter_params(net))  # the usual call must not free it
    assert not net.gate_proj.adapters["reference"].lora_a.weight.requires_grad
    assert "adapters.wide.lora_a.weight" in net.down_proj.state_dict()
    assert "lora_a.weight" not in net.down_proj.state_dict()


def test_each_adapter_computes_alone_and_only_it_gets_gradients() -> None:
    net = adapted()
    base = Net()
    base.load_state_dict({n: p for n, p in net.state_dict().items() if "lora" not in n})
    outputs = {}
    for name in ("policy", "wide", "reference", "base"):
        net.zero_grad(set_to_none=True)
        with adapter_mode(net, name):
            out = net(X)
            if name in ("policy", "wide"):
                out.square().sum().backward()
        outputs[name] = out.detach()
        used = {n for n, p in get_adapter_params(net).items() if p.grad is not None}
        chosen = {"policy": "default", "wide": "wide"}.get(name)
        assert used == (set(get_adapter_params(net, adapter=chosen)) if chosen else set())
        merged = copy.deepcopy(base)
        with torch.no_grad():
            chosen = {"policy": "default", "base": None}.get(name, name)
            for fqn in ("gate_proj", "o_proj", "down_proj"):
                layer = net.get_submodule(fqn)
                assert isinstance(layer, LoRALinear)
                if chosen is not None and chosen in layer.adapter_names():
                    merged.get_submodule(fqn).weight.copy_(layer.merged_weight(chosen))
        torch.testing.assert_close(outputs[name], merged(X))
    assert not torch.allclose(outputs["policy"], outputs["reference"])
    assert [n for n, _ in iter_merged_weights(net)] == ["gate_proj.weight", "o_proj.weight"]
    assert [n for n, _ in iter_merged_weights(net, adapter="wide")] == [
        "o_proj.weight",
        "down_proj.weight",
    ]


def test_adapters_start_at_the_base_from_values_of_their_own() -> None:
    net = Net()
    apply_lora(net, POLICY)
    before = net(X)
    add_adapter(net, "twin", POLICY)
    with adapter_mode(net, "twin"):
        torch.testing.assert_close(net(X), before)
    assert not torch.equal(
        net.gate_proj.lora_a.weight, net.gate_proj.adapters["twin"].lora_a.weight
    )  # other names, other values


def test_on_the_meta_device_values_come_with_initialise_adapters() -> None:
    with torch.device("meta"):
        net = Net()
    apply_lora(net, POLICY)
    add_adapter(net, "wide", WIDE)
    net.to_empty(device="cpu")
    initialise_adapters(net)
    eager = Net()
    apply_lora(eager, POLICY)
    add_adapter(eager, "wide", WIDE)
    theirs = get_adapter_state_dict(eager)
    for name, value in get_adapter_state_dict(net).items():
        assert torch.equal(value, theirs[name])


def test_a_copy_takes_the_values_and_is_its_own() -> None:
    net = adapted()
    copy_adapter(net, "default", "reference")
    with adapter_mode(net, "reference"):
        assert torch.equal(net(X), adapted()(X))
    kept = values(net)
    with torch.no_grad():
        for parameter in get_adapter_params(net, adapter="default").values():
            parameter.add_(1)
    for name in get_adapter_params(net, adapter="reference"):
        assert torch.equal(values(net)[name], kept[name])


def test_a_copy_between_unlike_adapters_is_refused_and_changes_nothing() -> None:
    net = adapted()
    add_adapter(net, "low", LoRAConfig(rank=2, target_modules=["gate_proj", "o_proj"]))
    add_adapter(net, "loud", LoRAConfig(rank=4, alpha=9, target_modules=["gate_proj", "o_proj"]))
    before = values(net)
    for other, reason in (
        ("wide", "only one of them has down_proj"),
        ("low", r"gate_proj.lora_a.weight is \(4, 6\) .* and \(2, 6\)"),
        ("loud", "at gate_proj the scaling is 2 in one, 2.25 in the other"),
    ):
        with pytest.raises(AdapterMismatch, match=reason):
            copy_adapter(net, "default", other)
    with pytest.raises(NoAdapterError, match="'nobody'"):
        copy_adapter(net, "nobody", "default")
    for name, value in values(net).items():
        assert torch.equal(value, before[name])


def test_a_removed_adapter_leaves_no_trace() -> None:
    net = adapted()
    set_active(net, "wide")
    remove_adapter(net, "wide")
    assert adapter_names(net) == ("default", "reference")
    assert net.o_proj.active == "default"
    assert not [n for n, _ in net.named_parameters() if "wide" in n]
    torch.testing.assert_close(net(X), adapted()(X))
    add_adapter(net, "wide", WIDE)  # the name is free again
    with pytest.raises(NoAdapterError, match=r"'nobody'.*added were: 'reference', 'wide'"):
        remove_adapter(net, "nobody")
    with pytest.raises(NoAdapterError, match="'default'"):
        remove_adapter(net, "default")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("policy", "a meaning of its own"),
        ("base", "a meaning of its own"),
        ("default", "has an adapter 'default' already"),
        ("wide", "has an adapter 'wide' already"),
        ("items", "a meaning of its own"),
        ("a.b", "letters, digits"),
        ("", "letters, digits"),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, reason: str) -> None:
    with pytest.raises(LoRAConfigError, match=reason):
        add_adapter(adapted(), name, WIDE)


def test_what_cannot_be_adapted_is_refused_and_nothing_changes() -> None:
    with pytest.raises(LoRANotEnabled, match="apply_lora"):
        add_adapter(Net(), "x", WIDE)
    net = adapted()
    before = str(net)
    with pytest.raises(TargetError, match="'k_proj' is for no module"):
        add_adapter(net, "x", LoRAConfig(target_modules=["down_proj", "k_proj"]))
    net.lm_head.weight = net.down_proj.weight  # tied, by force
    with pytest.raises(TargetError, match="tied"):
        add_adapter(net, "x", LoRAConfig(target_modules=["gate_proj", "lm_head"]))
    assert str(net) == before


def test_one_checkpoint_holds_all_and_one_export_one(tmp_path: Path) -> None:
    net = adapted()
    optimizer = torch.optim.AdamW(get_adapter_params(net).values(), lr=0.01)
    for name in ("policy", "wide"):
        with adapter_mode(net, name):
            net(X).square().sum().backward()
    optimizer.step()
    before = values(net)
    root = str(tmp_path / "run")
    with CheckpointManager(root) as manager:
        state = TrainState(net, optimizer, export=peft_export(net, adapter="wide"))
        manager.save(0, state, publish=True).wait()
    with CheckpointManager(root) as manager:
        # Another default than the saved one's: a restore must bring every value.
        fresh = adapted(seed=6)
        again = torch.optim.AdamW(get_adapter_params(fresh).values(), lr=0.01)
        assert manager.restore(TrainState(fresh, again)) == 0
    for name, value in values(fresh).items():
        assert torch.equal(value, before[name]), name
    (version,) = (p.parent for p in (tmp_path / "run" / "adapters").rglob("adapter_config.json"))
    moments = optimizer.state[net.gate_proj.lora_a.weight]["exp_avg"]
    assert torch.equal(again.state[fresh.gate_proj.lora_a.weight]["exp_avg"], moments)
    config, tensors = read_adapter(version)
    assert config["target_modules"] == ["down_proj", "o_proj"]
    assert config["r"] == config["lora_alpha"] == 2
    target = adapted(seed=7)
    load_adapter_tensors(target, tensors, config, adapter="wide")
    for name in get_adapter_params(net, adapter="wide"):
        torch.testing.assert_close(values(target)[name], before[name], rtol=2e-2, atol=2e-2)
    for name in get_adapter_params(net, adapter="default"):
        assert torch.equal(values(target)[name], values(adapted(seed=7))[name])


def test_a_warm_start_of_one_leaves_the_others_alone(tmp_path: Path) -> None:
    source = Net()
    apply_lora(source, POLICY)
    with torch.no_grad():
        for parameter in get_adapter_params(source).values():
            parameter.normal_()
    with CheckpointManager(str(tmp_path / "run"), publish_dtype="float32") as manager:
        manager.save(0, TrainState(source), publish=True).wait()
    (config,) = (tmp_path / "run" / "adapters").rglob("adapter_config.json")
    theirs = get_adapter_params(source)
    for name in ("default", "reference"):
        net = adapted()
        before = values(net)
        state = TrainState(net, export=peft_export(net, adapter=name))
        ckpt.warm_start(state, str(config.parent))
        mine = get_adapter_params(net, adapter=name)
        for other, value in values(net).items():
            assert torch.equal(value, before[other]) == (other not in mine), other
        for parameter, value in zip(mine.values(), theirs.values(), strict=True):
            torch.testing.assert_close(parameter, value)


def test_a_resume_without_the_reference_is_refused(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    with CheckpointManager(root) as manager:
        manager.save(0, TrainState(adapted())).wait()
    net = Net()
    apply_lora(net, POLICY)
    add_adapter(net, "wide", WIDE)
    with (
        CheckpointManager(root) as manager,
        pytest.raises(StateError, match=r"gate_proj\.adapters\.reference\.lora_a\.weight"),
    ):
        manager.restore(TrainState(net))
