"""Functions that run in processes of their own and export adapters."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ckpt.consolidate import consolidate
from ckpt.storage import open_storage
from ckpt.storage.faultpoints import ENVIRONMENT
from support.steps import tiny_adapter, write_step


def large_step(url: str, *, megabytes: int, world: int, options: dict[str, Any] | None) -> None:
    """Commit step 2, an fp32 adapter of that size sharded over ``world`` ranks; step 1 is tiny."""
    storage = open_storage(url, options)
    tensors, export = tiny_adapter(("layers.0.wq",), rank=64, optimizer=False)
    write_step(storage, 1, tensors, export=export)
    rows = megabytes * 2**20 // (2 * 4 * 64)
    tensors = {
        name: torch.randn((64, rows) if "lora_a" in name else (rows, 64)) for name in tensors
    }
    write_step(storage, 2, tensors, world=world, export=export)


def growth_of(
    url: str, out: str, cache_bytes: int, options: dict[str, Any] | None, answer: Any
) -> None:
    """Bytes by which this process's memory grows at most while step 2 is exported."""
    more = {"dtype": "float32", "cache_bytes": cache_bytes, "storage_options": options}
    consolidate(url, 1, f"{out}-first", **more)  # imports, pools and connections
    # What getrusage() tells includes the memory of whoever started this process.
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is used now
    before = _status("VmRSS")
    consolidate(url, 2, f"{out}-second", **more)
    answer.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of this process's memory, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def export_and_die(
    url: str, step: int, out: str, fault: str, options: dict[str, Any] | None
) -> None:
    """Export over what is there, in a process that kills itself at a named point."""
    os.environ[ENVIRONMENT] = fault
    consolidate(url, step, out, overwrite=True, storage_options=options)


def export_again_and_again(url: str, out: str) -> None:
    """Export steps 1 and 2 in turn, each over the other, until the process is killed."""
    while True:
        for step in (1, 2):
            consolidate(url, step, out, overwrite=True)
