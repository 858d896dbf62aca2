"""Adapters over quantised bases: the base computes by itself, and the update is added."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from support import ranks_quant
from support.ranks_quant import (
    IN,
    OUT,
    QUANTISERS,
    Net,
    X,
    base_of,
    bitsandbytes_int8,
    bitsandbytes_nf4,
    fill,
)
from support.spawn import run_ranks
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


def available(quantise: Callable[[nn.Module], nn.Module]) -> object:
    """The quantiser as a parameter that is skipped where its package is absent."""
    package = quantise.__name__.partition("_")[0]
    skip = pytest.mark.skipif(find_spec(package) is None, reason=f"needs {package}: [quant]")
    return pytest.param(quantise, id=quantise.__name__, marks=skip)


EACH = [available(quantise) for quantise in QUANTISERS]


@pytest.mark.parametrize("quantise", EACH)
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


@pytest.mark.parametrize("quantise", EACH)
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


@pytest.mark.parametrize("quantise", EACH)
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


@pytest.mark.parametrize("quantise", EACH)
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


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes: [quant]")
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


@pytest.mark.dist
@pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("torchao") is None,
    reason="needs torchao and bitsandbytes: [quant]",
)
def test_under_fsdp_a_base_is_split_where_it_can_be_and_else_left_whole() -> None:
    for found in run_ranks(2, ranks_quant.sharded):
        for name, (far, whole) in found.items():
            assert far < 1e-6, name
            assert whole is name.endswith("int8"), name
