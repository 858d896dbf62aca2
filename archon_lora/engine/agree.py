"""What ranks say to each other around a checkpoint, over a group made for that.

Everything here runs on the engine's ``cpu_group`` (gloo) and never on the default group, which may
be in the middle of a training collective; and every exchange begins with a barrier that has a
deadline and names the rank that is missing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from archon_lora.errors import PeerFailed

DEADLINE = 120.0
"""Seconds to wait for the other ranks where the engine's configuration does not say."""


def deadline_of(engine: object) -> float:
    """``engine.config.barrier_timeout`` in seconds, or :data:`DEADLINE`."""
    value = getattr(getattr(engine, "config", None), "barrier_timeout", None)
    return DEADLINE if value is None else float(value)


def rank_of(group: dist.ProcessGroup | None) -> int:
    """This process's rank in the group; 0 where there is no group."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in the group; 1 where there is no group."""
    return 1 if group is None else dist.get_world_size(group)


def barrier(group: dist.ProcessGroup | None, *, timeout: float) -> None:
    """Wait until every rank of the group is here.

    Args:
        group: a gloo group, or None for a single process.
        timeout: seconds to wait.

    Raises:
        RuntimeError: a rank did not come in time; the message (on the first rank) names it.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    dist.monitored_barrier(group, timeout=datetime.timedelta(seconds=timeout), wait_all_ranks=True)


def gather_json(group: dist.ProcessGroup | None, value: object, *, timeout: float) -> list[Any]:
    """Everybody's value, by rank; values are JSON, so nothing is unpickled."""
    if group is None or dist.get_world_size(group) == 1:
        return [json.loads(json.dumps(value))]
    barrier(group, timeout=timeout)
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([mine.numel()]), group=group)
    longest = max(int(s) for s in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: mine.numel()] = mine
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [
        json.loads(bytes(text[: int(size)].tolist()))
        for text, size in zip(texts, sizes, strict=True)
    ]


def agree(
    group: dist.ProcessGroup | None, error: Exception | None, *, what: str, timeout: float
) -> None:
    """Let every rank know whether all of them succeeded.

    Args:
        group: the ranks that take part; all of them must call.
        error: this rank's failure, or None.
        what: what was tried, for the message, e.g. ``"writing the adapter to /x"``.
        timeout: seconds to wait for the others.

    Raises:
        Exception: ``error`` itself on the rank that failed.
        PeerFailed: on the others, with the ranks that failed and why.
    """
    said = None if error is None else f"{type(error).__name__}: {error}"
    answers = gather_json(group, said, timeout=timeout)
    if error is not None:
        raise error
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(answers) if text is not None]
    if failed:
        msg = f"{what} failed on {'; '.join(failed)}"
        raise PeerFailed(msg)


@contextmanager
def attempt(group: dist.ProcessGroup | None, *, what: str, timeout: float) -> Iterator[None]:
    """Run a block that may fail on some ranks only, and fail on all ranks if it did on any.

    The block must hold no collective: a rank that fails leaves it at once.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
        error = caught
    agree(group, error, what=what, timeout=timeout)
