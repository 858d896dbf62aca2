"""The engine's process groups, mesh and device."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelMesh, build_mesh

from .config import EngineConfig


@dataclass(frozen=True, slots=True)
class Groups:
    """Who the engine talks to.

    Attributes:
        world: the ranks that train together.
        cpu_group: a gloo group over the same ranks, for checkpoints alone.
        mesh: how the ranks are laid out.
        device: where this rank computes.
        rank: in ``world``.
        world_size: of ``world``.
        owns_default: whether the default group was made here, so that it is ours to destroy.
    """

    world: dist.ProcessGroup
    cpu_group: dist.ProcessGroup
    mesh: ParallelMesh
    device: torch.device
    rank: int
    world_size: int
    owns_default: bool

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Ranks that have rows of their own, for the same part of the model."""
        return self.mesh.dp.get_group()

    @property
    def dp_rank(self) -> int:
        """Which rows this rank has; ranks of one ``tp`` group have the same."""
        return self.mesh.dp_rank

    @property
    def dp_size(self) -> int:
        """Into how many parts the rows of a batch are split."""
        return self.mesh.dims.dp


def open_groups(config: EngineConfig, process_group: dist.ProcessGroup | None = None) -> Groups:
    """Make what is missing of the process groups.

    Without a default group, one is made: from a launcher's environment (``torchrun``) or, where
    there is none, of this process alone. Every rank of the group must call.

    Args:
        config: device and deadlines.
        process_group: ranks that train together; None is all of them.

    Returns:
        The groups; close them with :func:`close_groups`.

    Raises:
        RuntimeError: ``device="cuda"`` where there is no CUDA device.
        ParallelConfigError: the layout does not fit the number of ranks.
    """
    device = _device(config)
    owns_default = not dist.is_initialized()
    if owns_default:
        _open_default(device)
    world = process_group if process_group is not None else dist.group.WORLD
    if world is None:
        msg = "this process has no default process group, although one is initialised"
        raise RuntimeError(msg)
    rank = dist.get_rank(world)
    size = dist.get_world_size(world)
    try:
        config.parallel.resolve(size)
    except ParallelConfigError:
        if owns_default:
            dist.destroy_process_group()
        raise
    # Its own group, for its own traffic: the default one may be inside a training collective.
    cpu_group = dist.new_group(
        ranks=dist.get_process_group_ranks(world),
        backend="gloo",
        timeout=datetime.timedelta(seconds=config.transfer_timeout),
        use_local_synchronization=size < dist.get_world_size(),
        group_desc="archon_lora_checkpoint",
    )
    if cpu_group is None or rank < 0:
        msg = "this process is not a member of the process group it was given"
        raise RuntimeError(msg)
    mesh = build_mesh(config.parallel, device.type, process_group=process_group)
    return Groups(
        world=world,
        cpu_group=cpu_group,
        mesh=mesh,
        device=device,
        rank=rank,
        world_size=size,
        owns_default=owns_default,
    )


def close_groups(groups: Groups) -> None:
    """Destroy what :func:`open_groups` made; every rank must call."""
    if not dist.is_initialized():
        return
    if groups.owns_default:
        dist.destroy_process_group()
    elif groups.world_size == dist.get_world_size():
        dist.destroy_process_group(groups.cpu_group)
    # A group of a part of the world is named after its members. Were it destroyed, the next one of
    # the same members would get its name, and with it the addresses of closed sockets that it left
    # in the store.


def _device(config: EngineConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        msg = "device='cuda' was asked for, but torch sees no CUDA device; set device='cpu'"
        raise RuntimeError(msg)
    if config.device == "cpu" or not available:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _open_default(device: torch.device) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        # Alone: a store in memory opens no socket.
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in the stubs
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
