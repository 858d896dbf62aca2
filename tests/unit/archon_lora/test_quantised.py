"""Adapters over quantised bases: the base computes by itself, and the update is added."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from archon_lora import (
    LoRAConfig,
    LoRALinear,
    MergeError,
    adapter_mode,
    apply_lora,
    get_adapter_params,
    iter_merged_weights,
    peft_export,
)
from ckpt import CheckpointManager, TrainState

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the quantisers' own imports
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

IN, OUT = 64, 256  # NF4 scales 64 values at once, and 256 of these scales


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(IN, OUT)
        self.down_proj = nn.Linear(OUT, IN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.tanh(self.o_proj(x)))


def torchao_int8(net: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao: [quant]")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def torchao_nf4(net: nn.Module) -> nn.Module:
    pytest.importorskip("torchao", reason="needs torchao: [quant]")
    # A function of the same name hides the module from attribute access.
    workflows = importlib.import_module("torchao.quantization.quantize_.workflows")
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nf4 = workflows.to_nf4(layer.weight.detach(), 64, 64)
            layer.weight = nn.Parameter(nf4, requires_grad=False)
    return net


def bitsandbytes_nf4(net: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: [quant]")
    for name, layer in list(net.named_children()):
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
        )
        quantised.load_state_dict(layer.state_dict())
        setattr(net, name, quantised.to("cpu"))  # the move quantises
    return net


def bitsandbytes_int8(net: nn.Module) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: [quant]")
    for name, layer in list(net.named_children()):
        quantised = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
        )
        quantised.load_state_dict(layer.state_dict())
        setattr(net, name, quantised.to("cpu"))
    return net


QUANTISERS = [torchao_int8, torchao_nf4, bitsandbytes_nf4, bitsandbytes_int8]
X = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))


def base_of(quantise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return quantise(Net())


def fill(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in get_adapter_params(net).values():
            parameter.normal_(std=0.1, generator=generator)
    return net


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_the_base_computes_by_itself_and_the_update_is_added(
    quantise: Callable[[nn.Module], nn.Module],
) -> None:
    net = base_of(quantise)
    before = net(X)
    weights = [type(net.o_proj.weight), net.o_proj.weight.dtype]
    apply_lora(net, LoRAConfig(rank=4, alpha=8))
    assert torch.equal(net(X), before)
    fill(net)
    layer = net.o_proj
    assert isinstance(layer, LoRALinear)
    assert [type(layer.weight), layer.weight.dtype] == weights
    with adapter_mode(net, "base"):
        base = layer(X)
        assert torch.equal(net(X), before)
    update = 2 * X @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    torch.testing.assert_close(layer(X), base + update)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_gradients_are_those_over_the_dequantised_weights(
    quantise: Callable[[nn.Module], nn.Module],
) -> None:
    net = base_of(quantise)
    plain = Net()
    if quantise is bitsandbytes_int8:
        pytest.skip("it rounds the activations too, so no plain layer computes the same")
    with torch.no_grad():
        for name in ("o_proj", "down_proj"):
            layer, twin = net.get_submodule(name), plain.get_submodule(name)
            eye = torch.eye(layer.in_features)
            bias = layer.bias if layer.bias is not None else 0
            twin.weight.copy_((layer(eye) - bias).T)
            if layer.bias is not None:
                twin.bias.copy_(layer.bias)
    for model in (net, plain):
        apply_lora(model, LoRAConfig(rank=4, alpha=8))
        fill(model)
    x = X.clone().requires_grad_()
    twin_x = X.clone().requires_grad_()
    net(x).square().sum().backward()
    plain(twin_x).square().sum().backward()
    theirs = get_adapter_params(plain)
    for name, parameter in get_adapter_params(net).items():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(x.grad, twin_x.grad, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_checkpoints_and_exports_are_of_the_adapter_alone(
    quantise: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    net = base_of(quantise)
    apply_lora(net, LoRAConfig(rank=4, alpha=8))
    fill(net)
    with CheckpointManager(str(tmp_path / "run")) as manager:
        manager.save(0, TrainState(net), publish=True).wait()
    want = net(X)
    names = [rule["source"] for rule in peft_export(net)["rules"]]
    assert sorted(get_adapter_params(net)) == sorted(names)
    fresh = base_of(quantise)
    apply_lora(fresh, LoRAConfig(rank=4, alpha=8))
    with CheckpointManager(str(tmp_path / "run")) as manager:
        assert manager.restore(TrainState(fresh)) == 0
    assert torch.equal(fresh(X), want)


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_merge_dequantises_in_fp32_or_is_refused(
    quantise: Callable[[nn.Module], nn.Module],
) -> None:
    net = base_of(quantise)
    apply_lora(net, LoRAConfig(rank=4, alpha=8))
    fill(net)
    if quantise in (bitsandbytes_nf4, bitsandbytes_int8):
        with pytest.raises(MergeError, match=r"base of o_proj is quantised.*not quantised"):
            list(iter_merged_weights(net))
        return
    merged = dict(iter_merged_weights(net))
    twin = Net()
    with torch.no_grad():
        twin.o_proj.bias.copy_(net.o_proj.bias)
        for name, weight in merged.items():
            assert weight.dtype == torch.float32
            twin.get_parameter(name).copy_(weight)
    torch.testing.assert_close(net(X), twin(X), rtol=1e-3, atol=1e-3)


def test_a_copy_of_an_adapted_layer_keeps_its_base() -> None:
    net = base_of(bitsandbytes_nf4)
    apply_lora(net, LoRAConfig(rank=4, alpha=8))
    fill(net)
    assert torch.equal(copy.deepcopy(net)(X), net(X))


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: [quant]")
def test_a_base_that_is_quantised_only_after_it_was_adapted() -> None:
    import bitsandbytes as bnb

    net = Net()
    late = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4")
    late.load_state_dict(net.o_proj.state_dict())
    net.o_proj = late
    apply_lora(net, LoRAConfig(rank=4, alpha=8))
    net.to("cpu")
    assert net.o_proj.weight.quant_state is not None
    assert torch.isfinite(net(X)).all()
