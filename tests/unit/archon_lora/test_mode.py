"""Switching between adapters: blocks nest, restore exactly, and do not recompile without end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from archon_lora import (
    AdapterModeError,
    LoRAConfig,
    LoRALinear,
    NoAdapterError,
    adapter_mode,
    adapters_disabled,
    apply_lora,
    disable_adapter,
    set_active,
)
from archon_lora.factors import LoRAPair


def layer_of(model: nn.Module, index: str) -> LoRALinear:
    layer = model.get_submodule(index)
    assert isinstance(layer, LoRALinear)
    return layer


def pair(layer: LoRALinear, name: str, rank: int, *, trainable: bool = True) -> None:
    made = LoRAPair(
        layer.in_features,
        layer.out_features,
        rank=rank,
        alpha=3.0,
        scaling=3.0 / rank,
        dropout=0.0,
        init="kaiming",
        adapter_dtype=torch.float32,
        device=torch.device("cpu"),
        fqn=f"{layer.fqn}.adapters.{name}",
        seed=1,
        trainable=trainable,
    )
    layer.put_adapter(name, made)


@pytest.fixture
def model() -> nn.Module:
    """Two adapted layers; ``other`` lies beside both, ``reference`` beside the first alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    apply_lora(net, LoRAConfig(rank=2, alpha=4))
    for index in ("0", "2"):
        pair(layer_of(net, index), "other", 3)
    pair(layer_of(net, "0"), "reference", 1, trainable=False)
    for layer in (layer_of(net, "0"), layer_of(net, "2")):
        layer.reset_adapter()
        with torch.no_grad():
            for name in layer.adapter_names():
                layer.adapter_of(name).lora_b.weight.normal_()
    return net


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(3))


def expected(model: nn.Module, name: str | None) -> torch.Tensor:
    """The same numbers from plain matrices."""
    hidden = X
    for index in ("0", "2"):
        layer = layer_of(model, index)
        weight = layer.weight.detach().clone()
        if name is not None and name in layer.adapter_names():
            chosen = layer.adapter_of(name)
            weight += chosen.scaling * chosen.lora_b.weight @ chosen.lora_a.weight
        hidden = hidden @ weight.T + layer.bias
        hidden = torch.tanh(hidden) if index == "0" else hidden
    return hidden.detach()


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("policy", "default"),
        ("default", "default"),
        ("base", None),
        ("reference", "reference"),
        ("other", "other"),
    ],
)
def test_each_mode_computes_its_adapter_alone(
    model: nn.Module, mode: str, name: str | None
) -> None:
    with adapter_mode(model, mode):
        torch.testing.assert_close(model(X), expected(model, name))
    torch.testing.assert_close(model(X), expected(model, "default"))


def test_blocks_nest_and_each_end_restores_what_was_before_it(model: nn.Module) -> None:
    layer_of(model, "2").disable()  # a single module's state must come back too
    before = model(X)
    with adapter_mode(model, "reference"):
        with adapter_mode(model, "base"), adapter_mode(model, "policy"):
            torch.testing.assert_close(model(X), expected(model, "default"))
        with (
            adapters_disabled(model),
            pytest.raises(KeyError, match="boom"),
            adapter_mode(model, "other"),
        ):
            raise KeyError("boom")
        torch.testing.assert_close(model(X), expected(model, "reference"))
    assert torch.equal(model(X), before)
    assert layer_of(model, "2").disabled
    assert not layer_of(model, "0").disabled


def test_the_policy_is_what_was_active_outside_of_all_blocks(model: nn.Module) -> None:
    set_active(model, "other")
    with adapter_mode(model, "reference"), adapter_mode(model, "policy"):
        torch.testing.assert_close(model(X), expected(model, "other"))
    set_active(model, None)
    torch.testing.assert_close(model(X), expected(model, None))
    with adapter_mode(model, "policy"):
        torch.testing.assert_close(model(X), expected(model, "other"))
    assert layer_of(model, "0").disabled


def test_a_block_over_a_part_of_the_model_leaves_the_rest(model: nn.Module) -> None:
    part = nn.Sequential(layer_of(model, "0"))
    with adapter_mode(model, "other"), adapter_mode(part, "base"):
        assert layer_of(model, "0").disabled
        assert not layer_of(model, "2").disabled
    assert layer_of(model, "0").active == layer_of(model, "2").active == "default"


def test_leaving_blocks_out_of_order_is_refused_and_loses_nothing(model: nn.Module) -> None:
    outer, inner = ExitStack(), ExitStack()
    before = model(X)
    outer.enter_context(adapter_mode(model, "reference"))
    inner.enter_context(adapter_mode(model, "base"))
    with pytest.raises(AdapterModeError, match="reverse order"):
        outer.close()
    torch.testing.assert_close(model(X), expected(model, None))  # the open block's mode
    inner.close()
    assert torch.equal(model(X), before)
    with adapter_mode(model, "base"):
        pass
    assert torch.equal(model(X), before)


def test_an_unknown_name_is_refused_with_the_names_there_are(model: nn.Module) -> None:
    wanted = r"no adapter 'refrence'.*'other', 'reference'"
    with pytest.raises(NoAdapterError, match=wanted), adapter_mode(model, "refrence"):
        pass
    with pytest.raises(NoAdapterError, match="'nobody'"):
        set_active(model, "nobody")
    torch.testing.assert_close(model(X), expected(model, "default"))


def test_a_choice_within_a_block_is_refused(model: nn.Module) -> None:
    with adapter_mode(model, "base"), pytest.raises(AdapterModeError, match="set_active"):
        set_active(model, "other")
    assert layer_of(model, "0").active == "default"


def test_a_change_within_a_block_ends_with_it(model: nn.Module) -> None:
    with adapter_mode(model, "other"):
        disable_adapter(model)
    assert not layer_of(model, "0").disabled


def test_a_copy_made_within_a_block_is_in_no_block(model: nn.Module) -> None:
    with adapter_mode(model, "base"):
        twin = copy.deepcopy(model)
    set_active(twin, "other")
    torch.testing.assert_close(twin(X), expected(model, "other"))


def test_toggling_compiled_blocks_makes_one_graph_for_each_mode(model: nn.Module) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    modes = ("policy", "base", "reference", "other")
    for _ in range(4):
        for mode in modes:
            with adapter_mode(compiled, mode):
                want = expected(model, {"policy": "default", "base": None}.get(mode, mode))
                torch.testing.assert_close(compiled(X), want)
    assert len(graphs) == len(modes)
