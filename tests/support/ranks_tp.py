"""What the ranks of the tests of tensor parallelism and of layouts do."""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims, ParallelMesh, build_mesh


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
    try:
        build_mesh(ParallelDims(tp=3), "cpu")
    except ParallelConfigError as error:
        found.append(str(error))
    dist.barrier()
    return found
