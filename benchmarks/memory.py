"""The section about memory: what a saver holds, and what each save takes on top."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .peers import DcpAsync, DcpSave
from .processes import Settings
from .savers import Manager, Saver, TorchSave
from .workload import train_state

SAVES = 5
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    msg = f"{STATUS} has no {field}"
    raise RuntimeError(msg)


def memory(settings: Settings, maker: Callable[[Any, dict[str, torch.Tensor], Path], Saver]) -> Any:
    """Resident memory of one saver, in bytes, in a process of its own.

    Returns:
        ``state`` (the tensors), ``held`` (what stays once the first two saves are done) and
        ``per_save`` (the peak of later saves above that).
    """
    state, tensors = train_state(settings.workload)
    gc.collect()
    before = _kilobytes("VmRSS")
    with closing(maker(state, tensors, settings.folder)) as saver:
        for number in range(2):
            saver.measure(number)
        held = _kilobytes("VmRSS")
        CLEAR.write_text("5", encoding="ascii")  # starts the peak anew (proc(5))
        for number in range(2, 2 + SAVES):
            saver.measure(number)
        peak = _kilobytes("VmHWM")
    return {
        "state": sum(t.nbytes for t in tensors.values()),
        "held": 1024 * (held - before),
        "per_save": 1024 * max(0, peak - held),
    }


def _manager(state: Any, tensors: dict[str, torch.Tensor], folder: Path) -> Saver:
    del tensors
    return Manager(state, folder)


def _plain(
    kind: Callable[[dict[str, torch.Tensor], Path], Saver],
    state: Any,
    tensors: dict[str, torch.Tensor],
    folder: Path,
) -> Saver:
    del state
    return kind(tensors, folder)


SECTIONS = {
    Manager.name: partial(memory, maker=_manager),
    DcpSave.name: partial(memory, maker=partial(_plain, DcpSave)),
    DcpAsync.name: partial(memory, maker=partial(_plain, DcpAsync)),
    TorchSave.name: partial(memory, maker=partial(_plain, TorchSave)),
}
"""One section for every saver that is compared."""
