"""Interleaved rounds of all savers on one or several ranks."""

from __future__ import annotations

import json
import os
import time
import warnings
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing

from ckpt import TrainState

from .savers import DcpAsync, Manager, Memcpy, RawWrite, Saver, TorchSave, local
from .workload import WORKLOADS, build, state_dict

Rounds = dict[str, list[tuple[float, float]]]
"""Saver's name to (stall, total) of each round, in milliseconds; the slowest rank counts."""


def _slowest(stall: float, total: float) -> tuple[float, float]:
    """The maxima over ranks."""
    times = torch.tensor([stall, total], dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return float(times[0]), float(times[1])


def _time(saver: Saver, step: int) -> tuple[float, float]:
    """(stall, total) of one save in milliseconds."""
    dist.barrier()
    begin = time.perf_counter()
    saver.start(step)
    stall = time.perf_counter() - begin
    saver.finish()
    total = time.perf_counter() - begin
    dist.barrier()
    saver.tidy()
    return _slowest(stall * 1e3, total * 1e3)


def _rank(rank: int, world: int, workload: str, repeats: int, folder: Path) -> None:
    """One process: build the state, run the rounds, rank 0 writes ``<folder>/<world>.json``."""
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # DCP warns about its own use of process groups and storages; that is its users' affair.
    warnings.filterwarnings("ignore", module=r"torch\.")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / f"rendezvous-{world}"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    model, optimizer = build(WORKLOADS[workload])
    tensors = state_dict(model, optimizer)
    place = folder / f"ranks-{world}"
    place.mkdir(exist_ok=True)
    with closing(Manager(TrainState(model, optimizer), place)) as manager:
        savers: list[Saver] = [
            Memcpy(tensors),
            manager,
            DcpAsync(tensors, place),
            TorchSave(tensors, place),
            RawWrite(tensors, place),
        ]
        for saver in savers:  # the first save of each plans and allocates
            _time(saver, 0)
        rounds: Rounds = {saver.name: [] for saver in savers}
        for step in range(1, repeats + 1):
            # Each round begins with another saver, so that none always follows the same one.
            for saver in (*savers[step % len(savers) :], *savers[: step % len(savers)]):
                rounds[saver.name].append(_time(saver, step))
    if rank == 0:
        result = {"bytes_per_rank": sum(t.nbytes for t in local(tensors)), "rounds": rounds}
        (folder / f"{world}.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def measure(world: int, workload: str, repeats: int, folder: Path) -> tuple[int, Rounds]:
    """Run the rounds on ``world`` fresh processes.

    Returns:
        Bytes saved by rank 0, and the rounds.
    """
    multiprocessing.spawn(_rank, (world, workload, repeats, folder), nprocs=world)
    found = json.loads((folder / f"{world}.json").read_text(encoding="utf-8"))
    return found["bytes_per_rank"], found["rounds"]
