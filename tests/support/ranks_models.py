"""What the ranks of the model tests do; each function runs on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from archon_lora import LoRAConfig, apply_lora, initialise_adapters
from archon_lora.errors import ModelLoadError
from archon_lora.models import get_model_spec, hf_files, load_hf_weights, load_pretrained
from archon_lora.models.hf_files import read_config

SEED_TOKENS = 17

ADAPTER = LoRAConfig(rank=1, alpha=2)
"""Rank 1: split over its rank, an adapter would leave ranks without any of A."""


@dataclass
class ReadLog:
    """Every block that was taken out of a safetensors file, seen from outside the reader."""

    blocks: list[tuple[str, tuple[tuple[int, int], ...], int]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(size for _, _, size in self.blocks)


class _Slice:
    def __init__(self, name: str, inner: Any, log: ReadLog) -> None:
        self.name, self.inner, self.log = name, inner, log

    def get_shape(self) -> list[int]:
        return self.inner.get_shape()

    def get_dtype(self) -> str:
        return self.inner.get_dtype()

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        block = self.inner[index]
        bounds = tuple((part.start, part.stop) for part in index)
        self.log.blocks.append((self.name, bounds, block.numel() * block.element_size()))
        return block


class _File:
    """The part of ``safe_open`` that reads by slices; a whole-tensor read is an AttributeError."""

    def __init__(self, inner: Any, log: ReadLog) -> None:
        self.inner, self.log = inner, log

    def __enter__(self) -> _File:
        self.inner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.__exit__(*error)

    def keys(self) -> list[str]:
        return self.inner.keys()

    def get_slice(self, name: str) -> _Slice:
        return _Slice(name, self.inner.get_slice(name), self.log)


@contextmanager
def logged_reads() -> Iterator[ReadLog]:
    log = ReadLog()
    original = hf_files.safe_open
    hf_files.safe_open = lambda *args, **kwargs: _File(original(*args, **kwargs), log)
    try:
        yield log
    finally:
        hf_files.safe_open = original


def sharded_model(
    directory: str,
    mesh_shape: tuple[int, ...],
    *,
    lora: bool | LoRAConfig = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """A model on the meta device, adapted, sharded and materialised; weights not loaded."""
    raw = read_config(Path(directory))
    spec = get_model_spec(raw["model_type"])
    config = spec.config_cls.from_hf(raw)
    adapter = spec.state_dict_adapter_cls(config)
    with torch.device("meta"):
        model = spec.model_cls(config)
    model.to(dtype)
    if lora:
        config = ADAPTER if lora is True else lora
        apply_lora(model, config, name_map=adapter.module_to_hf)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    spec.parallelize_fn(model, mesh, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            local(parameter).fill_(7.0)
    if lora:
        initialise_adapters(model)
    return model, adapter


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def load(
    rank: int, world: int, directory: str, mesh_shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    model, adapter = sharded_model(directory, mesh_shape, dtype=dtype)
    with logged_reads() as log:
        report = load_hf_weights(model, adapter, directory)
    state = adapter.to_hf(model.state_dict())
    assert all(isinstance(tensor, DTensor) for tensor in state.values())
    return {
        "weights": full(state),
        "blocks": log.blocks,
        "read": log.total,
        "reported": report.bytes_read,
        "held": {name: local(tensor).numel() for name, tensor in state.items()},
        "rows": {name: local(tensor).shape[0] for name, tensor in state.items()},
    }


def load_broken(rank: int, world: int, directory: str) -> tuple[str, bool]:
    """The error of a directory that does not fit, and whether every local value is as before."""
    model, adapter = sharded_model(directory, (world,))
    try:
        load_hf_weights(model, adapter, directory)
    except ModelLoadError as error:
        untouched = all(bool((local(p) == 7.0).all()) for p in model.parameters())
        return str(error), untouched
    return "loaded", False


def tokens_for(vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED_TOKENS)
    return torch.randint(0, vocab, (2, 11), generator=generator)


def step(model: nn.Module, vocab: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one batch."""
    tokens = tokens_for(vocab)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    logits = model(tokens, attention_mask=mask)[mask.bool()]
    torch.nn.functional.cross_entropy(logits.float(), tokens[mask.bool()]).backward()
    return logits.detach(), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def reference(
    directory: str, *, lora: bool | LoRAConfig
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same on one process without any sharding."""
    model, adapter = load_pretrained(directory)
    if lora:
        config = ADAPTER if lora is True else lora
        apply_lora(model, config, name_map=adapter.module_to_hf)
    wake_adapters(model)
    return step(model, model.config.vocab_size)


def wake_adapters(model: nn.Module) -> None:
    """Give B values, so that gradients reach A too; each rank fills its own rows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.add_(0.1)


def train_step(
    rank: int, world: int, directory: str, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Logits and full gradients for every way of preparing the model."""
    results = []
    for case in cases:
        model, adapter = sharded_model(directory, (world,), **case)
        load_hf_weights(model, adapter, directory)
        wake_adapters(model)
        forwards: list[int] = []
        if not case.get("compile"):
            hook = model.layers["0"].ffn_norm.register_forward_hook
            hook(lambda *_, log=forwards: log.append(1))
        graphs = counters["stats"]["unique_graphs"]
        logits, grads = step(model, model.config.vocab_size)
        results.append(
            {
                "logits": logits,
                "grads": full(grads),
                "names": sorted(name for name, _ in model.named_parameters()),
                "state": sorted(model.state_dict()),
                "dtypes": {str(p.dtype) for p in model.parameters()},
                "empty": {n for n, p in model.named_parameters() if local(p).numel() == 0},
                "forwards": len(forwards),
                "graphs": counters["stats"]["unique_graphs"] - graphs,
            }
        )
    return results


def adapter_on(targets: list[str]) -> LoRAConfig:
    return LoRAConfig(rank=1, alpha=2, target_modules=targets)


def train_families(
    rank: int, world: int, directories: list[str], targets: list[list[str]]
) -> list[dict[str, Any]]:
    """Logits and full adapter gradients of models of several families."""
    results = []
    for directory, names in zip(directories, targets, strict=True):
        case = {"lora": adapter_on(names), "activation_checkpointing": True}
        results += train_step(rank, world, directory, [case])
    return results


def save_trained(rank: int, world: int, directory: str, out: str) -> torch.Tensor:
    """Train a whole model a little, save it for transformers; its logits."""
    from archon_lora.engine import SaveLoadMeta
    from support.engines import make_engine, train

    with make_engine(directory, lora=None) as engine:
        train(engine, 2)
        engine.save(SaveLoadMeta(path=out))
        with torch.no_grad():
            return engine.model.eval()(tokens_for(96))
