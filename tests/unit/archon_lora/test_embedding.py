"""Adapters on embeddings, without PEFT: placement, refusals, and what counts as an effect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import Shard

from archon_lora import (
    LoRAConfig,
    adapter_mode,
    adapter_shard_placement,
    add_adapter,
    apply_lora,
    copy_adapter,
    get_adapter_params,
    initialise_adapters,
    remove_adapter,
)
from archon_lora.embedding import LoRAEmbedding
from archon_lora.errors import ParallelConfigError
from archon_lora.tensor_parallel import VocabularyParallel
from ckpt import TrainState
from ckpt.errors import ConfigError
from ckpt.handoff.proof import _has_effect
from ckpt.peft_config import config_bytes, split_key


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 6, padding_idx=3)
        self.q_proj = nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.q_proj(self.embed_tokens(ids))


CONFIG = LoRAConfig(rank=2, alpha=6, target_modules=["embed_tokens"])
IDS = torch.tensor([[1, 3, 11], [0, 1, 1]])


def adapted() -> tuple[Net, LoRAEmbedding]:
    torch.manual_seed(0)
    net = Net()
    apply_lora(net, CONFIG)
    assert isinstance(net.embed_tokens, LoRAEmbedding)
    return net, net.embed_tokens


def test_forward_is_the_formula_and_padding_gets_no_gradient() -> None:
    net, layer = adapted()
    with torch.no_grad():
        layer.lora_embedding_a.normal_()
    a, b = layer.lora_embedding_a, layer.lora_embedding_b
    expected = layer.weight[IDS] + 3 * a.T[IDS] @ b.T
    torch.testing.assert_close(layer(IDS), expected)
    net(IDS).sum().backward()
    assert layer.weight.grad is None
    assert not torch.count_nonzero(a.grad[:, 3])
    assert torch.count_nonzero(a.grad[:, 1])


def test_values_come_from_seed_and_name_on_every_device() -> None:
    with torch.device("meta"):
        late = Net()
    apply_lora(late, CONFIG)
    late.to_empty(device="cpu")
    initialise_adapters(late)
    early, _ = adapted()
    theirs = get_adapter_params(early)
    for name, value in get_adapter_params(late).items():
        assert torch.equal(value, theirs[name])


def test_all_linear_leaves_embeddings_alone() -> None:
    net = Net()
    assert list(apply_lora(net, LoRAConfig()).matched) == ["q_proj"]


def test_a_is_split_over_the_rows_of_the_table_where_that_is_even() -> None:
    net, layer = adapted()
    assert adapter_shard_placement(net, shards=4)(layer.lora_embedding_a) == Shard(1)
    assert adapter_shard_placement(net, shards=5)(layer.lora_embedding_a) is None
    assert adapter_shard_placement(net, shards=4)(layer.lora_embedding_b) is None


def test_a_table_with_a_padding_row_is_not_split_over_ranks() -> None:
    _, layer = adapted()
    assert layer.padding_idx is not None
    with pytest.raises(ParallelConfigError, match="without padding_idx and max_norm, got LoRAEmb"):
        VocabularyParallel().parts(layer)
    layer.padding_idx = None
    assert VocabularyParallel().parts(layer).keys() == {n for n, _ in layer.named_parameters()}


def test_the_grammar_of_keys_knows_embeddings() -> None:
    key = "base_model.model.model.embed_tokens.lora_embedding_B"
    assert split_key(key) == ("model.embed_tokens", "B")
    with pytest.raises(ConfigError, match="is not of the form"):
        split_key(f"{key}.weight")


@pytest.mark.parametrize(("a", "b", "felt"), [(0, 1, False), (1, 0, False), (1, 1, True)])
def test_an_adapter_has_an_effect_if_neither_factor_is_zero(
    tmp_path: Path, a: int, b: int, felt: bool
) -> None:
    tensors = {
        "base_model.model.embed_tokens.lora_embedding_A": torch.full((2, 12), float(a)),
        "base_model.model.embed_tokens.lora_embedding_B": torch.full((6, 2), float(b)),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = CONFIG.to_peft(target_modules=["embed_tokens"])
    (tmp_path / "adapter_config.json").write_bytes(config_bytes(config))
    assert _has_effect(tmp_path) is felt


@pytest.mark.parametrize("first", ["embed_tokens", "q_proj"])
def test_other_adapters_compute_and_are_copied_and_removed_by_name(first: str) -> None:
    net = Net()
    config = LoRAConfig(rank=2, alpha=6, target_modules=[first])
    apply_lora(net, config)
    add_adapter(net, "more", LoRAConfig(rank=3, alpha=3, target_modules=["embed_tokens"]))
    add_adapter(net, "reference", config, trainable=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in get_adapter_params(net, frozen=True).values():
            parameter.normal_()
    layer = net.embed_tokens
    assert isinstance(layer, LoRAEmbedding)
    pair = layer.adapters["more"]
    base = layer.weight[IDS]
    with adapter_mode(net, "more"):
        update = pair.lora_embedding_a.T[IDS] @ pair.lora_embedding_b.T
        torch.testing.assert_close(layer(IDS), base + update)
        layer(IDS).square().sum().backward()
        grads = {n for n, p in net.named_parameters() if p.grad is not None}
        assert grads == set(get_adapter_params(net, adapter="more"))
    assert torch.equal(layer(IDS), base) == (first == "q_proj")
    before = net(IDS)
    copy_adapter(net, "default", "reference")
    with adapter_mode(net, "reference"):
        assert torch.equal(net(IDS), before)
    assert not any("reference" in name for name in get_adapter_params(net))
    saved = {name.removeprefix("model.") for name in TrainState(net).live().tensors}
    assert saved == set(get_adapter_params(net, frozen=True))
    place = adapter_shard_placement(net, shards=4)
    assert place(pair.lora_embedding_a) == Shard(1)
    remove_adapter(net, "more")
    assert "more" not in layer.adapter_names()
    assert torch.equal(net(IDS), before)
