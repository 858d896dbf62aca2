"""LoRALinear: the base shared and untouched, the first output equal, the gradients right."""

from __future__ import annotations

import copy
import hashlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from archon_lora import LoRAConfigError, LoRALinear, MergeError, NoAdapterError, TargetError
from archon_lora.bases import check_base
from benchmarks.activations import kept_bytes


def bits(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(raw).hexdigest()


def trained(layer: LoRALinear) -> LoRALinear:
    with torch.no_grad():
        layer.lora_b.weight.normal_()
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_first_output_equals_the_base(bias: bool, dtype: torch.dtype, training: bool) -> None:
    linear = nn.Linear(24, 10, bias=bias, dtype=dtype).train(training)
    x = torch.randn(2, 5, 24, dtype=dtype)
    before = linear(x)
    layer = LoRALinear.from_linear(linear, rank=4, alpha=8, dropout=0.3)
    after = layer(x)
    assert torch.equal(before, after)
    assert after.dtype == dtype
    assert layer.training is training


def test_from_linear_shares_the_base_and_freezes_it() -> None:
    linear = nn.Linear(6, 4)
    weight, bias = linear.weight, linear.bias
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert layer.weight is weight
    assert layer.bias is bias
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.lora_a.weight.requires_grad
    assert layer.lora_b.weight.requires_grad
    assert sorted(layer.state_dict()) == ["bias", "lora_a.weight", "lora_b.weight", "weight"]
    assert isinstance(layer, nn.Linear)


def test_building_an_adapter_leaves_the_global_generator_alone() -> None:
    linear = nn.Linear(6, 4)
    before = torch.get_rng_state()
    LoRALinear.from_linear(linear, rank=2, alpha=4)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("use_rslora", [True, False])
def test_forward_is_the_formula(use_rslora: bool) -> None:
    layer = trained(LoRALinear(7, 5, rank=4, alpha=6, use_rslora=use_rslora))
    x = torch.randn(3, 7)
    factor = 6 / (2 if use_rslora else 4)
    expected = F.linear(x, layer.weight, layer.bias)
    expected = expected + factor * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    torch.testing.assert_close(layer(x), expected)
    assert layer.scaling == factor


def test_gradients_against_finite_differences() -> None:
    layer = trained(
        LoRALinear(4, 3, rank=2, alpha=3, dtype=torch.float64, adapter_dtype=torch.float64)
    )
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_a.weight, layer.lora_b.weight

    def run(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        values = {"lora_a.weight": a, "lora_b.weight": b}
        return torch.func.functional_call(layer, values, (x,))

    assert torch.autograd.gradcheck(
        run, (x, a.detach().requires_grad_(), b.detach().requires_grad_())
    )
    layer(x).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert layer.weight.grad is None
    assert layer.bias.grad is None


def test_at_the_start_b_gets_a_gradient_and_a_none() -> None:
    layer = LoRALinear(4, 3, rank=2, alpha=2)
    layer(torch.randn(5, 4)).square().sum().backward()
    assert torch.count_nonzero(layer.lora_b.weight.grad) > 0
    assert torch.count_nonzero(layer.lora_a.weight.grad) == 0


def test_dropout_acts_on_the_adapter_in_training_only() -> None:
    layer = trained(LoRALinear(50, 8, rank=4, alpha=8, dropout=0.5))
    x = torch.randn(16, 50)
    assert not torch.equal(layer(x), layer(x))
    torch.manual_seed(1)
    masked = F.dropout(x, 0.5)
    torch.manual_seed(1)
    expected = F.linear(x, layer.weight, layer.bias) + 2.0 * (
        masked @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    )
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    without = trained(LoRALinear(50, 8, rank=4, alpha=8))
    assert torch.equal(without(x), without(x))


def test_disabled_is_the_base_alone_and_enable_undoes_it() -> None:
    linear = nn.Linear(6, 4)
    x = torch.randn(3, 6)
    base = linear(x)
    layer = trained(LoRALinear.from_linear(linear, rank=2, alpha=4))
    assert not torch.equal(layer(x), base)
    layer.disable()
    assert layer.disabled
    assert torch.equal(layer(x), base)
    assert "disabled" in repr(layer)
    layer.enable()
    assert not torch.equal(layer(x), base)
    assert "disabled" not in repr(layer)


def test_fp32_adapter_over_a_bf16_base_adds_in_fp32() -> None:
    layer = trained(LoRALinear(16, 8, rank=4, alpha=4, dtype=torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.lora_a.weight.dtype == torch.float32
    x = torch.randn(3, 16, dtype=torch.bfloat16)
    update = x.float() @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    expected = (F.linear(x, layer.weight, layer.bias) + update).bfloat16()
    assert torch.equal(layer(x), expected)
    layer(x).float().sum().backward()
    assert layer.lora_a.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weight_is_fp32_and_leaves_the_base_to_the_bit(dtype: torch.dtype) -> None:
    layer = trained(LoRALinear(16, 8, rank=4, alpha=8, dtype=dtype))
    before = {name: bits(value) for name, value in layer.state_dict().items()}
    merged = layer.merged_weight()
    expected = layer.weight.float() + 2.0 * layer.lora_b.weight @ layer.lora_a.weight
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-6)
    assert merged.dtype == torch.float32
    assert not merged.requires_grad
    assert merged.data_ptr() != layer.weight.data_ptr()
    assert {name: bits(value) for name, value in layer.state_dict().items()} == before
    x = torch.randn(3, 16)
    layer.float()
    torch.testing.assert_close(F.linear(x, merged, layer.bias), layer(x), rtol=1e-5, atol=1e-5)


def test_a_small_update_survives_the_merge_that_bf16_would_lose() -> None:
    layer = LoRALinear(64, 64, rank=4, alpha=4, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.lora_b.weight.normal_(std=1e-5)
    delta = layer.merged_weight() - layer.weight.float()
    assert float((delta != 0).float().mean()) > 0.9


def test_meta_device_construction_then_initialisation() -> None:
    layer = LoRALinear(6, 4, rank=2, alpha=4, device="meta", fqn="a.b", seed=3)
    assert layer.lora_a.weight.is_meta
    with pytest.raises(
        NoAdapterError, match=r"adapter of a\.b is on the meta device; call to_empty"
    ):
        layer.reset_adapter()
    layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.fill_(5.0)
        layer.lora_b.weight.fill_(9.0)
    layer.reset_adapter()
    direct = LoRALinear(6, 4, rank=2, alpha=4, fqn="a.b", seed=3)
    assert torch.equal(layer.lora_a.weight, direct.lora_a.weight)
    assert torch.count_nonzero(layer.lora_b.weight) == 0
    assert bool((layer.weight == 5.0).all())
    assert layer.lora_a.weight.requires_grad
    assert not layer.weight.requires_grad
    on_meta = LoRALinear.from_linear(nn.Linear(6, 4, device="meta"), rank=2, alpha=4)
    assert all(p.is_meta for p in on_meta.parameters())


def test_a_sweep_of_reset_parameters_keeps_b_zero() -> None:
    layer = LoRALinear(6, 4, rank=2, alpha=4)
    old = layer.weight.clone()
    expected = layer.lora_a.weight.clone()
    trained(layer)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.count_nonzero(layer.lora_b.weight) == 0
    assert torch.equal(layer.lora_a.weight, expected)
    assert not torch.equal(layer.weight, old)


def test_names_and_shapes_of_the_parameters() -> None:
    layer = LoRALinear(6, 4, rank=2, alpha=4)
    assert layer.adapter_params() == ["lora_a.weight", "lora_b.weight"]
    assert layer.lora_a.weight.shape == (2, 6)
    assert layer.lora_b.weight.shape == (4, 2)
    assert layer.lora_a.bias is None


def test_repr_shows_the_settings() -> None:
    text = repr(LoRALinear(6, 4, rank=2, alpha=5, dropout=0.25))
    assert "in_features=6, out_features=4, bias=True" in text
    assert "rank=2, alpha=5, scaling=2.5, dropout=0.25" in text


class Doubling(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes what nn.Linear computes."""


class Named(nn.Linear):
    """A subclass with an attribute that an adapted layer has in another meaning."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.scaling = 3


def test_a_base_with_a_forward_of_its_own_keeps_it_and_its_class() -> None:
    base = Doubling(3, 2)
    base.note = "kept"  # type: ignore[assignment]
    x = torch.randn(4, 3)
    before = base(x)
    layer = trained(LoRALinear.from_linear(base, rank=2, alpha=4, fqn="x"))
    update = 2 * x @ layer.lora_a.weight.T @ layer.lora_b.weight.T
    torch.testing.assert_close(layer(x), before + update)
    layer.disable()
    assert torch.equal(layer(x), before)
    assert isinstance(layer, Doubling)
    assert layer.note == "kept"
    with pytest.raises(MergeError, match="the base of x is quantised, or computed"):
        layer.merged_weight()
    torch.testing.assert_close(copy.deepcopy(layer)(x), before)


def test_bases_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(TargetError, match=r"Named with attributes .*: scaling"):
        LoRALinear.from_linear(Named(), rank=1, alpha=1, fqn="x")
    with pytest.raises(TargetError, match=r"LayerNorm; only nn\.Linear and nn\.Embedding can take"):
        check_base(nn.LayerNorm(2), "norm")
    patched = nn.Linear(2, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(TargetError, match="forward was replaced on the object itself"):
        check_base(patched, "patched")
    with pytest.raises(TargetError, match="no plain parameter 'weight'"):
        check_base(nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), "orth")
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TargetError, match=r"hooks that would be lost \(_forward_hooks\)"):
        check_base(hooked, "hooked")
    again = LoRALinear(2, 2, rank=1, alpha=1)
    with pytest.raises(TargetError, match="holds an adapter already"):
        check_base(again, "again")
    assert isinstance(LoRALinear.from_linear(Renamed(2, 2), rank=1, alpha=1), LoRALinear)


@pytest.mark.parametrize("setting", [{"rank": 0}, {"alpha": "abc"}, {"dropout": 1.5}])
def test_settings_are_validated_without_a_config_too(setting: dict) -> None:
    name = next(iter(setting))
    with pytest.raises(LoRAConfigError, match=f"{name} must be"):
        LoRALinear(4, 3, **{"rank": 2, "alpha": 2, **setting})


def test_a_copy_is_independent() -> None:
    layer = LoRALinear(4, 3, rank=2, alpha=2)
    twin = copy.deepcopy(layer)
    trained(twin)
    assert torch.count_nonzero(layer.lora_b.weight) == 0
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_a_forward_keeps_its_input_and_the_narrow_middle_for_backward(base: torch.dtype) -> None:
    tokens, width, rank = 32, 48, 4
    layer = trained(LoRALinear(width, 96, rank=rank, alpha=8, dtype=base))
    x = torch.randn(tokens, width, dtype=base, requires_grad=True)
    # In the adapter's dtype, fp32: the input for A's gradient, what A made of it for B's. Nothing
    # as wide as the output.
    assert kept_bytes(layer, lambda: layer(x)) == 4 * tokens * (width + rank)
    layer.disable()
    assert kept_bytes(layer, lambda: layer(x)) == 0


class WidePasses(TorchDispatchMode):
    """The operations whose result has the given shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.found = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and tuple(result.shape) == self.shape:
            self.found.append(func.overloadpacket.__name__)
        return result


def test_the_update_costs_one_product_and_one_sum_at_output_width_and_nothing_backward() -> None:
    layer = trained(LoRALinear(16, 64, rank=2, alpha=6, bias=False))
    x = torch.randn(8, 16, requires_grad=True)
    with WidePasses((8, 64)) as forward:
        y = layer(x)
    assert forward.found == ["mm", "mm", "add"]
    gradient = torch.randn(8, 64)
    with WidePasses((8, 64)) as backward:
        y.backward(gradient)
    assert backward.found == []
