"""What the ranks of the tests of tensor parallelism and of layouts do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from archon_lora import (
    LoRAConfig,
    adapter_shard_placement,
    apply_lora,
    get_adapter_params,
    initialise_adapters,
)
from archon_lora.engine import clip_grad_norm
from archon_lora.init import initial_value
from archon_lora.models import KVCache, get_model_spec, load_hf_weights
from archon_lora.models.hf_files import read_config
from archon_lora.models.parallel_dims import ParallelDims, ParallelMesh, build_mesh
from archon_lora.models.pipeline import split_decoder
from archon_lora.models.tensor_plan import split_tensors
from archon_lora.parallel import LoRAColwiseParallel, LoRARowwiseParallel
from archon_lora.placement import copy_global_, reshard
from archon_lora.tensor_parallel import ColumnParallel, Whole


def _line(mesh: DeviceMesh | None) -> object:
    """The ranks of a mesh as nested lists, and whether a collective over it reaches just them."""
    if mesh is None:
        return None
    for dim in range(mesh.ndim):
        total = torch.ones(1)
        dist.all_reduce(total, group=mesh.get_group(dim))
        assert int(total) == mesh.size(dim)
    return mesh.mesh.tolist()


def describe(mesh: ParallelMesh) -> dict[str, object]:
    views = ("fsdp", "dp", "tp", "pp", "ep", "expert_fsdp")
    found: dict[str, object] = {name: _line(getattr(mesh, name)) for name in views}
    return {**found, "dims": mesh.root.mesh_dim_names, "dp_rank": mesh.dp_rank}


def meshes(rank: int, world: int, layouts: list[ParallelDims], members: int) -> list[object]:
    """Views of every layout over all ranks, and of the last over the first ``members`` ranks."""
    found: list[object] = [describe(build_mesh(dims, "cpu")) for dims in layouts]
    part = dist.new_group(list(range(members)))
    if rank < members:
        tp = dataclasses.replace(layouts[-1], dp_shard=-1)
        found.append(describe(build_mesh(tp, "cpu", process_group=part)))
    dist.barrier()
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of training a tiny model.

    Attributes:
        directory: the model's.
        dims: the layout; None is one process without any mesh.
        lora: None trains everything.
        options: passed to ``parallelize``.
        steps: optimizer steps.
    """

    directory: str
    dims: ParallelDims | None = None
    lora: LoRAConfig | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 2


def build(case: Case) -> tuple[nn.Module, ParallelMesh | None]:
    """The model with its weights and its adapter's first values."""
    raw = read_config(Path(case.directory))
    spec = get_model_spec(raw["model_type"])
    config = spec.config_cls.from_hf(raw)
    names = spec.state_dict_adapter_cls(config)
    with torch.device("meta"):
        model = spec.model_cls(config)
    model.to(torch.float32)
    if case.lora is not None:
        apply_lora(model, case.lora, name_map=names.module_to_hf)
    mesh = None
    if case.dims is not None:
        mesh = build_mesh(case.dims, "cpu")
        spec.parallelize_fn(model, mesh, **case.options)
    model.to_empty(device="cpu")
    load_hf_weights(model, names, case.directory)
    if case.lora is not None:
        initialise_adapters(model)
    return model, mesh


def batch(step: int, vocab: int = 90) -> tuple[Tensor, Tensor]:
    """Four rows of eleven tokens, some of them padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocab, (4, 11), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    mask[2, :2] = 0
    return tokens, mask


def whole(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def train(case: Case) -> dict[str, Any]:
    """Train on the same rows whatever the layout; everything that must not depend on it."""
    model, mesh = build(case)
    share, ranks = (0, 1) if mesh is None else (mesh.dp_rank, mesh.dims.dp)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first = {name: whole(p) for name, p in params.items()}
    with torch.no_grad():
        for name, parameter in params.items():
            if name.endswith("lora_b.weight"):
                copy_global_(parameter, initial_value(1, name, parameter.shape, "kaiming"))
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2, eps=1e-3)
    found: dict[str, Any] = {"first": first, "norms": [], "losses": []}
    for step in range(case.steps):
        tokens, mask = (t.chunk(ranks)[share] for t in batch(step))
        logits = model(tokens, attention_mask=mask)
        real = mask[:, 1:].bool()
        picked = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, tokens[:, 1:, None])
        # A sum over all rows, whoever has them; FSDP2 takes the mean over those who do.
        loss = -picked[..., 0][real].sum() / 30
        (loss * ranks).backward()
        if step == 0:
            found["logits"] = logits.detach().clone()
            found["grads"] = {name: whole(p.grad) for name, p in params.items()}
            found["placements"] = {
                name: str(p.placements) for name, p in params.items() if isinstance(p, DTensor)
            }
        found["norms"].append(clip_grad_norm(params.values(), 0.5))
        found["losses"].append(_sum(loss.detach(), mesh))
        optimizer.step()
        optimizer.zero_grad()
    reshard(model)
    found["trained"] = {name: whole(p) for name, p in params.items()}
    found["dp_rank"] = share
    found["state"] = sorted(model.state_dict())
    return found


def _sum(value: Tensor, mesh: ParallelMesh | None) -> float:
    if mesh is not None:
        for dim in range(mesh.fsdp.ndim):
            dist.all_reduce(value, group=mesh.fsdp.get_group(dim))
    return float(value)


def train_all(rank: int, world: int, cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Every case on the same ranks: starting processes is what takes most of the time."""
    return {name: train(case) for name, case in cases.items()}


class Net(nn.Module):
    """A block without a family: two layers, both with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def net(rank: int) -> Net:
    torch.manual_seed(3)
    model = Net()
    apply_lora(model, LoRAConfig(rank=rank, alpha=2 * rank))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b.weight"):
                parameter.copy_(initial_value(1, name, parameter.shape, "kaiming"))
    return model


def net_step(model: nn.Module) -> dict[str, Any]:
    """Output, gradients and what the optimizer makes of them; no FSDP2 that could help out."""
    torch.manual_seed(4)
    x = torch.randn(2, 6, 12, requires_grad=True)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(params.values(), lr=1.0)
    with CommDebugMode() as forward:
        y = model(x)
    with CommDebugMode() as backward:
        y.square().mean().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in params.values()])
    found = {
        "y": y.detach(),
        "x": x.grad,
        "norm": whole(norm),
        "collectives": {
            "forward": forward.get_total_counts(),
            "backward": backward.get_total_counts(),
        },
        "grads": {n: whole(p.grad) for n, p in params.items()},
        "partial": [
            n
            for n, p in params.items()
            if isinstance(p, DTensor) and p.grad.placements != p.placements
        ],
        "replicas": {n: p.grad.to_local() for n, p in params.items() if isinstance(p, DTensor)},
    }
    optimizer.step()
    return {**found, "trained": {n: whole(p) for n, p in params.items()}}


def styles(rank: int, world: int, adapter_ranks: list[int]) -> list[dict[str, Any]]:
    """The two styles through torch's own parallelize_module()."""
    mesh = init_device_mesh("cpu", (world,))
    results = []
    for adapter_rank in adapter_ranks:
        model = parallelize_module(
            net(adapter_rank), mesh, {"up": LoRAColwiseParallel(), "down": LoRARowwiseParallel()}
        )
        found = net_step(model)
        found["types"] = {type(p) for p in model.parameters()}
        found["state"] = list(model.state_dict())
        results.append(found)
    return results


class Packed(nn.Parameter):
    """A weight of another kind, as quantised layers have them."""


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def refusals(rank: int, world: int, directory: str) -> dict[str, str]:
    """What cannot be split, as the error says it."""
    tp = ParallelDims(tp=2)
    line = init_device_mesh("cpu", (world,))
    dropping = LoRAConfig(rank=2, dropout=0.1)
    bare, packed = Net(), Net()
    packed.up.weight = Packed(packed.up.weight.detach())
    twice = net(2)
    parallelize_module(twice, line, {"up": LoRAColwiseParallel()})
    strange = get_model_spec("qwen2").model_cls(
        get_model_spec("qwen2").config_cls.from_hf(directory)
    )
    mesh = build_mesh(tp, "cpu").tp
    stage = split_decoder(strange, 2, [0])[0]
    strange.extra = nn.Linear(2, 2)
    return {
        "dropout": _message(lambda: build(Case(directory, tp, dropping))),
        "world": _message(lambda: build(Case(directory, ParallelDims(tp=3)))),
        "heads": _message(lambda: build(Case(directory, ParallelDims(tp=4)))),
        "router": _message(lambda: Whole().parts(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)))),
        "not adapted": _message(
            lambda: parallelize_module(bare, line, {"up": LoRAColwiseParallel()})
        ),
        "twice": _message(lambda: parallelize_module(twice, line, {"up": LoRAColwiseParallel()})),
        "packed": _message(lambda: parallelize_module(packed, line, {"up": ColumnParallel()})),
        "no rule": _message(lambda: split_tensors(strange, mesh)),
        "stage": _message(lambda: split_tensors(stage, mesh, sequence_parallel=True)),
        "cache": _message(lambda: _with_cache(directory)),
    }


@torch.no_grad()
def _with_cache(directory: str) -> None:
    model, _ = build(Case(directory, ParallelDims(tp=2, sequence_parallel=True)))
    model(batch(0)[0], cache=KVCache(20))


def transformers_grads(rank: int, world: int, directory: str) -> dict[str, Tensor]:
    """Whole gradients of an adapter on transformers' own model; four ranks are FSDP2 x TP."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    apply_lora(model, LoRAConfig(rank=3, alpha=6))
    for name, parameter in get_adapter_params(model).items():
        if name.endswith("lora_b.weight"):
            copy_global_(parameter, initial_value(1, name, parameter.shape, "kaiming"))
    tokens = batch(0)[0]
    if world > 1:
        mesh = build_mesh(ParallelDims(tp=2), "cpu")
        tokens = tokens.chunk(2)[mesh.dp_rank]
        columns = ("self_attn.[qkv]_proj", "mlp.gate_proj", "mlp.up_proj")
        plan: dict[str, Any] = {f"model.layers.*.{n}": LoRAColwiseParallel() for n in columns}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"model.layers.*.{name}"] = LoRARowwiseParallel()
        parallelize_module(model, mesh.tp, plan)
        place = adapter_shard_placement(model, shards=2)
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh.fsdp, shard_placement_fn=place)
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: whole(p.grad) for name, p in get_adapter_params(model).items()}


def several(rank: int, world: int, calls: dict[str, tuple[str, tuple]]) -> dict[str, Any]:
    """Functions of this module by name, on the same ranks."""
    return {key: globals()[name](rank, world, *args) for key, (name, args) in calls.items()}
