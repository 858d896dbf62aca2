"""The protocol, and what is done with all adapters of a model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from archon_lora import (
    AdapterMismatch,
    AdapterModule,
    LoRAConfig,
    LoRALinear,
    NoAdapterError,
    adapters_disabled,
    apply_lora,
    disable_adapter,
    enable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    set_trainable_params,
)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Sequential(nn.Linear(4, 4)))
    apply_lora(net, LoRAConfig(rank=2, alpha=4))
    with torch.no_grad():
        for parameter in get_adapter_params(net).values():
            parameter.normal_()
    return net


NAMES = ["0.lora_a.weight", "0.lora_b.weight", "2.0.lora_a.weight", "2.0.lora_b.weight"]


class Scale(nn.Module):
    """An adapter module of another kind: named in the protocol, cannot be switched."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.shift = nn.Parameter(torch.zeros(3))
        self.names = names

    def adapter_params(self) -> list[str]:
        return self.names


def test_the_protocol_is_checked_at_run_time() -> None:
    assert isinstance(LoRALinear(2, 2, rank=1, alpha=1), AdapterModule)
    assert isinstance(Scale(["gain"]), AdapterModule)
    assert not isinstance(nn.Linear(2, 2), AdapterModule)


def test_parameters_are_collected_by_protocol_not_by_name() -> None:
    net = model()
    params = get_adapter_params(net)
    assert list(params) == NAMES
    assert params["2.0.lora_b.weight"] is net[2][0].lora_b.weight
    plain = nn.ModuleDict({"lora_like": nn.Linear(2, 2)})
    assert get_adapter_params(plain) == {}
    assert list(get_adapter_params(nn.Sequential(Scale(["gain", "shift"])))) == [
        "0.gain",
        "0.shift",
    ]


def test_a_parameter_that_is_named_but_missing_is_an_error() -> None:
    with pytest.raises(AdapterMismatch, match=r"Scale '0' names the adapter parameter 'gone'"):
        get_adapter_params(nn.Sequential(Scale(["gain", "shift", "gone"])))


def test_a_parameter_that_trains_but_is_not_named_is_an_error() -> None:
    with pytest.raises(AdapterMismatch, match=r"'0\.shift' requires a gradient.*never be saved"):
        get_adapter_params(nn.Sequential(Scale(["gain"])))
    net = model()
    net[0].weight.requires_grad_(True)
    with pytest.raises(AdapterMismatch, match=r"'0\.weight' requires a gradient"):
        get_adapter_params(net)


def test_names_are_those_of_the_bare_model_under_every_wrapper() -> None:
    net = model()
    net[0] = checkpoint_wrapper(net[0])
    net[2][0] = torch.compile(net[2][0], backend="eager")
    for wrapped in (net, torch.compile(net, backend="eager"), checkpoint_wrapper(net)):
        assert list(get_adapter_params(wrapped)) == NAMES
        assert list(get_adapter_state_dict(wrapped)) == NAMES
        with adapters_disabled(wrapped):
            assert net[2][0]._orig_mod.disabled
        assert not net[2][0]._orig_mod.disabled


def test_set_trainable_params_takes_names_or_the_mapping() -> None:
    net = model()
    set_trainable_params(net, ["0.bias", "2.0.lora_b.weight"])
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        "0.bias",
        "2.0.lora_b.weight",
    }
    set_trainable_params(net, ["0.lora_a.weight"])
    set_trainable_params(net, get_adapter_params(net))
    assert [n for n, p in net.named_parameters() if p.requires_grad] == NAMES
    with pytest.raises(AdapterMismatch, match=r"not parameters of the model: 0\.gone, 1\.x"):
        set_trainable_params(net, ["0.gone", "1.x", "0.bias"])
    with pytest.raises(NoAdapterError, match="nothing would train"):
        set_trainable_params(net, {})
    assert [n for n, p in net.named_parameters() if p.requires_grad] == NAMES


def test_state_dict_is_live_or_a_full_copy() -> None:
    net = model()
    live = get_adapter_state_dict(net)
    full = get_adapter_state_dict(net, full=True)
    assert list(live) == list(full) == NAMES
    assert not any(v.requires_grad for v in (*live.values(), *full.values()))
    with torch.no_grad():
        net[0].lora_a.weight.zero_()
    assert torch.count_nonzero(live["0.lora_a.weight"]) == 0
    assert torch.count_nonzero(full["0.lora_a.weight"]) > 0


def test_no_adapters_is_an_error_not_an_empty_result() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    for call in (get_adapter_state_dict, disable_adapter, enable_adapter):
        with pytest.raises(NoAdapterError, match=r"apply_lora\(\) was not called on it"):
            call(plain)
    with pytest.raises(NoAdapterError), adapters_disabled(plain):
        pass


def test_disable_and_enable_the_whole_model() -> None:
    net = model()
    x = torch.randn(2, 4)
    adapted = net(x)
    disable_adapter(net)
    base = net(x)
    assert not torch.equal(adapted, base)
    enable_adapter(net)
    assert torch.equal(net(x), adapted)


def test_the_earlier_state_comes_back_when_blocks_nest() -> None:
    net = model()
    with adapters_disabled(net):
        with adapters_disabled(net):
            assert net[0].disabled
        assert net[0].disabled, "the end of the inner block must not enable the outer one's"
        assert net[2][0].disabled
    assert not net[0].disabled


def test_the_earlier_state_comes_back_per_module_and_on_an_exception() -> None:
    net = model()
    net[0].disable()

    def failing() -> None:
        with adapters_disabled(net):
            assert net[2][0].disabled
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert net[0].disabled
    assert not net[2][0].disabled


def test_an_adapter_that_cannot_be_switched_is_an_error_and_nothing_is_switched() -> None:
    net = nn.Sequential(LoRALinear(3, 3, rank=1, alpha=1), Scale(["gain", "shift"]))
    with pytest.raises(NoAdapterError, match=r"Scale '1' .*the base model cannot be computed"):
        disable_adapter(net)
    with pytest.raises(NoAdapterError), adapters_disabled(net):
        pass
    assert not net[0].disabled
