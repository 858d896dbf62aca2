"""What the ranks of the engine's tests do; each function runs on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from archon_lora.engine.agree import agree, barrier, gather_json
from archon_lora.engine.gather import gather_full
from archon_lora.engine.grad_norm import clip_grad_norm


def reference_grads(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of an adapter of this LoRA rank, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (rank, 12), "b": (8, rank), "plain": (5,)}
    return {name: torch.randn(*shape, generator=generator) * 3 for name, shape in shapes.items()}


def reference_norm(grads: dict[str, torch.Tensor], norm_type: float) -> float:
    flat = torch.cat([g.flatten().double() for g in grads.values()])
    return float(torch.linalg.vector_norm(flat, norm_type))


def _sharded(grads: dict[str, torch.Tensor], mesh, placements) -> dict[str, nn.Parameter]:
    params = {}
    for name, grad in grads.items():
        if name == "plain":
            params[name] = nn.Parameter(torch.zeros_like(grad))
            params[name].grad = grad.clone()
        else:
            params[name] = nn.Parameter(
                distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None)
            )
            params[name].grad = distribute_tensor(
                grad.clone(), mesh, placements, src_data_rank=None
            )
    return params


def _full(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def norms(rank: int, world: int, lora_rank: int, norm_type: float, layout: str) -> dict:
    """Norm and clipped gradients of one layout: ``shard``, ``hybrid`` or ``replicate``."""
    if layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s"))
        placements = [Replicate(), Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (world,))
        placements = [Shard(0) if layout == "shard" else Replicate()]
    params = _sharded(reference_grads(lora_rank), mesh, placements)
    empty = sum(p.grad.to_local().numel() == 0 for n, p in params.items() if n != "plain")
    norm = clip_grad_norm(params.values(), 1.0, norm_type=norm_type)
    clipped = {n: _full(p.grad).tolist() for n, p in params.items()}
    return {"norm": norm, "clipped": clipped, "empty": empty}


def norms_without_grads(rank: int, world: int, norm_type: float, have: list[int]) -> float:
    """Only the ranks in ``have`` hold gradients; rank 0 passes no parameters at all."""
    grads = reference_grads(2)
    params = []
    if rank != 0 or 0 in have:
        params = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
        if rank in have:
            for param, grad in zip(params, grads.values(), strict=True):
                param.grad = grad.clone()
    return clip_grad_norm(params, None, norm_type=norm_type)


def norms_nonfinite(rank: int, world: int, value: float, norm_type: float) -> tuple[float, bool]:
    """One bad number on the last rank; every rank must see it, and nothing may be scaled."""
    mesh = init_device_mesh("cpu", (world,))
    params = _sharded(reference_grads(world), mesh, [Shard(0)])
    local = params["a"].grad.to_local()
    if rank == world - 1:
        local[0, 0] = value
    before = params["b"].grad.to_local().clone()
    norm = clip_grad_norm(params.values(), 1e-3, norm_type=norm_type)
    return norm, bool(torch.equal(before, params["b"].grad.to_local()))


def agreement(rank: int, world: int) -> list[str]:
    """One rank fails; afterwards the group still works."""
    group = dist.new_group(backend="gloo")
    said = []
    error = OSError("disk full") if rank == world - 1 else None
    try:
        agree(group, error, what="writing", timeout=20)
    except Exception as caught:
        said.append(f"{type(caught).__name__}: {caught}")
    agree(group, None, what="writing again", timeout=20)
    said.append(repr(gather_json(group, {"rank": rank, "text": "é" * rank}, timeout=20)))
    return said


def late(rank: int, world: int) -> str:
    """The last rank never comes to the barrier."""
    group = dist.new_group(backend="gloo")
    dist.barrier(group)
    if rank == world - 1:
        return "absent"
    try:
        barrier(group, timeout=2)
    except RuntimeError as error:
        return str(error)
    return "no error"


def gathered(rank: int, world: int) -> dict | None:
    """Rows, columns, uneven rows and a plain tensor, brought to rank 0."""
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (world,))
    source = {
        "rows": torch.arange(24.0).view(8, 3),
        "columns": torch.arange(24.0, dtype=torch.bfloat16).view(3, 8),
        "uneven": torch.arange(6).view(3, 2),
        "scalar": torch.tensor(7.5),
    }
    dims = {"rows": 0, "columns": 1, "uneven": 0}
    tensors = {
        name: distribute_tensor(t, mesh, [Shard(dims[name])], src_data_rank=None)
        if name in dims
        else t
        for name, t in source.items()
    }
    if rank == world - 1:
        tensors["only_here"] = torch.full((2,), 3.0)
    got = dict(gather_full(tensors, group, timeout=20))
    if rank != 0:
        return {name: value is None for name, value in got.items()}
    return {
        name: name == "only_here" or (torch.equal(got[name], source[name]), str(got[name].dtype))
        for name in got
    }
