"""How ranks are laid out: data, tensor, expert and pipeline parallelism, and their meshes.

Ranks are numbered with tensor parallelism fastest, so that the ranks that talk most lie on one
host; then shards, replicas and pipeline stages::

    rank = ((stage * dp_replicate + replica) * dp_shard + shard) * tp + t

Experts borrow ranks: ``ep`` divides ``dp_shard``. The ranks of one shard dimension form
``dp_shard / ep`` groups of ``ep``; a group shares the experts out, and what each rank has of them
is sharded over the ``dp_shard / ep`` ranks that have the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from archon_lora.errors import ParallelConfigError

PP, DP_REPLICATE, DP_SHARD, TP = "pp", "dp_replicate", "dp_shard", "tp"
DP = "dp"
EXPERT_SHARD, EP = "expert_shard", "ep"


@dataclass(frozen=True, slots=True)
class ParallelDims:
    """Sizes of the dimensions that ranks are laid out in.

    Attributes:
        dp_replicate: copies of the sharded model (HSDP); each copy has its own rows of a batch.
        dp_shard: ranks over which parameters, gradients and moments are sharded (FSDP2); -1 for
            all that the others leave.
        tp: ranks that share each layer's matrices (tensor parallelism) and see the same rows.
        ep: ranks that share the experts out; divides ``dp_shard``.
        pp: pipeline stages.
        sequence_parallel: between the matrices, activations are sharded over the ``tp`` ranks
            by position; needs ``tp`` above 1.
    """

    dp_replicate: int = 1
    dp_shard: int = -1
    tp: int = 1
    ep: int = 1
    pp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        """Check every value by itself.

        Raises:
            ParallelConfigError: a size below 1, or sequence parallelism without ``tp``.
        """
        for name in ("dp_replicate", "dp_shard", "tp", "ep", "pp"):
            value: object = getattr(self, name)
            least_met = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not least_met and not (name == DP_SHARD and value == -1):
                rest = ", or -1 for what is left" if name == DP_SHARD else ""
                msg = f"{name} must be an integer >= 1{rest}, got {value!r}"
                raise ParallelConfigError(msg)
        flag: object = self.sequence_parallel
        if not isinstance(flag, bool):
            msg = f"sequence_parallel must be true or false, got {flag!r}"
            raise ParallelConfigError(msg)
        if self.sequence_parallel and self.tp == 1:
            msg = "sequence_parallel splits activations over the tp ranks: set tp above 1"
            raise ParallelConfigError(msg)
        if self.dp_shard != -1 and self.dp_shard % self.ep:
            msg = f"ep must divide dp_shard, got ep={self.ep} and dp_shard={self.dp_shard}"
            raise ParallelConfigError(msg)

    @property
    def dp(self) -> int:
        """Ranks that have rows of their own; ``dp_shard`` must be known."""
        return self.dp_replicate * self.dp_shard

    def resolve(self, world: int) -> ParallelDims:
        """The same with ``dp_shard`` filled in, for a number of ranks.

        Args:
            world: ranks.

        Raises:
            ParallelConfigError: the sizes do not multiply to ``world``, or ``ep`` does not divide
                what is left for ``dp_shard``.
        """
        fixed = self.pp * self.dp_replicate * self.tp
        named = f"pp={self.pp} x dp_replicate={self.dp_replicate} x tp={self.tp}"
        if self.dp_shard == -1:
            if world % fixed:
                msg = (
                    f"{world} ranks cannot be laid out as {named}: their product, {fixed}, does "
                    f"not divide {world}"
                )
                raise ParallelConfigError(msg)
            left = world // fixed
            if left % self.ep:
                msg = (
                    f"{world} ranks with {named} leave dp_shard={left}, which ep={self.ep} does "
                    "not divide"
                )
                raise ParallelConfigError(msg)
            return replace(self, dp_shard=left)
        if fixed * self.dp_shard != world:
            msg = (
                f"{named} x dp_shard={self.dp_shard} is {fixed * self.dp_shard} ranks, and there "
                f"are {world}; dp_shard=-1 takes what is left"
            )
            raise ParallelConfigError(msg)
        return self


@dataclass(frozen=True, slots=True)
class ParallelMesh:
    """The meshes of a layout; all are of the same ranks.

    Attributes:
        dims: the sizes, ``dp_shard`` filled in.
        root: dimensions ``pp``, ``dp_replicate``, ``dp_shard`` and ``tp``, in this order; those of
            size 1 are left out, except ``dp_shard``.
        fsdp: what ``fully_shard`` takes: ``dp_shard`` alone, or ``dp_replicate`` and ``dp_shard``.
        dp: one dimension over all ranks that have rows of their own and the same model part (of a
            caller's own mesh, :func:`mesh_of`, that mesh).
        tp: None where ``tp`` is 1.
        pp: None where ``pp`` is 1.
        ep: None where ``ep`` is 1.
        expert_fsdp: as ``fsdp``, for what one rank of ``ep`` holds of the experts.
        experts: where experts lie beside that: ``ep`` alone, or ``ep`` and ``tp``; None as ``ep``.
    """

    dims: ParallelDims
    root: DeviceMesh
    fsdp: DeviceMesh
    dp: DeviceMesh
    tp: DeviceMesh | None
    pp: DeviceMesh | None
    ep: DeviceMesh | None
    expert_fsdp: DeviceMesh
    experts: DeviceMesh | None = None

    @property
    def dp_rank(self) -> int:
        """Which rows this rank has: its number among the ``dims.dp`` that have different ones."""
        place = self.fsdp.get_coordinate()
        if place is None:
            msg = "this process is not in the mesh"
            raise RuntimeError(msg)
        return place[0] if len(place) == 1 else place[0] * self.dims.dp_shard + place[1]


def build_mesh(
    dims: ParallelDims, device_type: str, *, process_group: dist.ProcessGroup | None = None
) -> ParallelMesh:
    """Make the meshes of a layout; every rank must call.

    Args:
        dims: the sizes; resolved here.
        device_type: ``"cpu"`` or ``"cuda"``.
        process_group: the ranks; None is all of them.

    Returns:
        The meshes.

    Raises:
        ParallelConfigError: the sizes do not fit the number of ranks.
    """
    world = dist.get_world_size(process_group)
    dims = dims.resolve(world)
    ranks = None if world == dist.get_world_size() else dist.get_process_group_ranks(process_group)
    sizes = {PP: dims.pp, DP_REPLICATE: dims.dp_replicate, DP_SHARD: dims.dp_shard, TP: dims.tp}
    kept = [name for name, size in sizes.items() if size > 1 or name == DP_SHARD]
    root = _mesh({name: sizes[name] for name in kept}, device_type, ranks)
    replicated = dims.dp_replicate > 1
    fsdp = root[DP_REPLICATE, DP_SHARD] if replicated else root[DP_SHARD]
    dp = root[DP_SHARD]
    if replicated:
        dp = _mesh(_outside(dims, {DP: dims.dp}), device_type, ranks)[DP]
    ep, experts, expert_fsdp = None, None, fsdp
    if dims.ep > 1:
        # A mesh beside the root: one dimension of a mesh cannot be cut in two afterwards.
        split = {DP_REPLICATE: dims.dp_replicate} if replicated else {}
        split |= {EXPERT_SHARD: dims.dp_shard // dims.ep, EP: dims.ep}
        beside = _mesh(_outside(dims, split), device_type, ranks)
        ep = beside[EP]
        experts = beside[EP, TP] if dims.tp > 1 else ep
        expert_fsdp = beside[DP_REPLICATE, EXPERT_SHARD] if replicated else beside[EXPERT_SHARD]
    return ParallelMesh(
        dims=dims,
        root=root,
        fsdp=fsdp,
        dp=dp,
        tp=root[TP] if dims.tp > 1 else None,
        pp=root[PP] if dims.pp > 1 else None,
        ep=ep,
        expert_fsdp=expert_fsdp,
        experts=experts,
    )


def _outside(dims: ParallelDims, inner: dict[str, int]) -> dict[str, int]:
    """Sizes by name of a mesh whose data-parallel dimensions are ``inner``."""
    before = {PP: dims.pp} if dims.pp > 1 else {}
    after = {TP: dims.tp} if dims.tp > 1 else {}
    return {**before, **inner, **after}


def _mesh(sizes: dict[str, int], device_type: str, ranks: list[int] | None) -> DeviceMesh:
    """A mesh over all ranks, or over some of them, of which only those call."""
    shape, names = tuple(sizes.values()), tuple(sizes)
    if ranks is None:
        return init_device_mesh(device_type, shape, mesh_dim_names=names)
    grid = torch.tensor(ranks, dtype=torch.int).view(shape)
    groups = [_own_group(line) for line in _lines(grid)]
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=names)


def _lines(grid: torch.Tensor) -> Iterator[list[int]]:
    """For each dimension the ranks that differ from this one in nothing else."""
    here = (grid == dist.get_rank()).nonzero()[0].tolist()
    for dim in range(grid.ndim):
        place = tuple(slice(None) if d == dim else i for d, i in enumerate(here))
        yield grid[place].tolist()


def _own_group(ranks: list[int]) -> dist.ProcessGroup:
    """A group that its members make among themselves."""
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc="archon_lora_mesh")
    if not isinstance(group, dist.ProcessGroup):
        msg = f"ranks {ranks} could not make a process group"
        raise RuntimeError(msg)  # noqa: TRY004 - torch's sign for "not a member", not a wrong type
    return group


def mesh_of(mesh: DeviceMesh) -> ParallelMesh:
    """A layout for a mesh that a caller made: one dimension to shard over, or replicas and shards.

    Args:
        mesh: one dimension, or two: replicate over the first, shard over the second.

    Raises:
        ParallelConfigError: more than two dimensions.
    """
    if mesh.ndim > 2:
        msg = f"a mesh must have one or two dimensions, got {mesh.ndim}; use build_mesh()"
        raise ParallelConfigError(msg)
    sizes = tuple(mesh.shape)
    dims = ParallelDims(dp_replicate=math.prod(sizes[:-1]), dp_shard=sizes[-1])
    return ParallelMesh(
        dims=dims, root=mesh, fsdp=mesh, dp=mesh, tp=None, pp=None, ep=None, expert_fsdp=mesh
    )
