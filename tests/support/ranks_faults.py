"""The trainers of the fault matrix: restore, train, save under a fault, tell what they saw."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Imported here, once, because every rank is forked from the process that imports this module.
import ckpt.storage.s3
from ckpt import AdapterExport, CheckpointManager, CkptError, Retention, TensorRule, TrainState
from ckpt.storage import faultpoints

SMALL_PUT_BYTES = 16 * 1024
"""Where uploads are to be multipart: shards are above this, manifests below."""

EXPORT = AdapterExport(
    peft_config={
        "peft_type": "LORA",
        "r": 48,
        "lora_alpha": 48,
        "target_modules": ["lin"],
        "bias": "none",
    },
    rules=(
        TensorRule("a", "base_model.model.lin.lora_A.weight"),
        TensorRule("b", "base_model.model.lin.lora_B.weight"),
    ),
)


class Position:
    """A data position, different on every rank."""

    def __init__(self, rank: int) -> None:
        self.rank, self.position = rank, 0

    def state_dict(self) -> dict[str, int]:
        return {"rank": self.rank, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Toy:
    """A model whose next value depends on its whole past and on who trained it.

    The tensors are replicas, of which the plan gives each rank some to write.
    """

    def __init__(self, rank: int = 0, tag: str = "") -> None:
        self.tag = tag
        self.model = nn.Module()
        self.model.a = nn.Parameter(torch.zeros(48, 64))
        self.model.b = nn.Parameter(torch.zeros(64, 48))
        self.model.register_buffer("c", torch.zeros(7, dtype=torch.int64))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, foreach=False)
        self.position = Position(rank)
        self.state = TrainState(
            self.model,
            self.optimizer,
            None,
            self.position,
            {"policy_version": 0, "story": ""},
            export=EXPORT,
        )

    def step(self) -> None:
        """Train: gradients are drawn from the tag and the step's number."""
        extra = self.state.extra
        extra["policy_version"] += 1
        extra["story"] += self.tag
        seed = hashlib.sha256(f"{extra['story']}:{extra['policy_version']}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:6], "big"))
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.model.c.add_(torch.randint(0, 99, (7,), generator=generator))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.position.position += 1

    def digest(self) -> str:
        """SHA-256 over every tensor and value that a resume must bring back."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state.live().tensors.items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().contiguous().numpy().tobytes())
        values = [self.state.extra, self.position.position]
        found.update(json.dumps(values, sort_keys=True).encode())
        return found.hexdigest()


@dataclass(frozen=True)
class Script:
    """What a trainer is to do.

    Attributes:
        root: path or URL.
        options: storage options.
        tag: makes its training differ from another trainer's.
        restore_step: the step to restore, or None for the newest.
        saves: step numbers, saved one after another.
        fault: value of the fault variable, or ``""``.
        victim: the rank that meets it, or None for all.
        armed: the save from which on it holds; -1 for the restore already.
        publish: publish with every save.
        small_parts: uploads of shards are multipart.
        deadline: the vote's, in seconds.
        latest: how many steps retention keeps.
        known: directory where rank 0 notes each step's digest before it is saved.
        year: the year that the trainer's clock shows, or None for the real time.
        trace: count the fault points that are passed.
        close: close the manager; otherwise the process just ends, as after an error.
    """

    root: str
    options: Mapping[str, Any] | None = None
    tag: str = "x"
    restore_step: int | None = None
    saves: tuple[int, ...] = ()
    fault: str = ""
    victim: int | None = None
    armed: int = -1
    publish: bool = False
    small_parts: bool = False
    deadline: float = 20.0
    latest: int = 9
    known: str = ""
    year: int | None = None
    trace: bool = False
    close: bool = True


@dataclass
class Seen:
    """What a rank saw.

    Attributes:
        start: the restored step.
        digest: of the state after the restore.
        damaged: the messages about steps that were passed over.
        committed: steps whose handle said so.
        errors: (step, class, message); step -1 is the restore, None the close.
        took: seconds from the start of the saves to the end of the last wait.
        passed: fault points and how often they were passed.
    """

    start: int | None = None
    digest: str = ""
    damaged: list[str] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    errors: list[tuple[int | None, str, str]] = field(default_factory=list)
    took: float = 0.0
    passed: dict[str, int] = field(default_factory=dict)


def arm(fault: str) -> None:
    """Put a fault in force in this process."""
    os.environ[faultpoints.ENVIRONMENT] = fault
    faultpoints.forget()


RETRY = {"attempts": 3, "base": 0.01, "cap": 0.05, "seconds": 2.0}
"""Few tries and short pauses, so that a broken store costs a test little time."""


def train(rank: int, world: int, script: Script) -> Seen:
    """Carry a script out."""
    if script.small_parts:
        ckpt.storage.s3.SINGLE_PUT_BYTES = SMALL_PUT_BYTES
    options = None if script.options is None else {**script.options, "retry": RETRY}
    if script.year is not None:
        _set_clock(script.year)
    seen = Seen()
    toy = Toy(rank, script.tag)
    manager = CheckpointManager(
        script.root,
        storage_options=options,
        retention=Retention(latest=script.latest),
        vote_timeout=script.deadline,
    )
    mine = script.fault and script.victim in (None, rank)
    if mine and script.armed == -1:
        arm(script.fault)
    try:
        seen.start = manager.restore(toy.state, step=script.restore_step)
    except CkptError as error:
        seen.errors.append((-1, type(error).__name__, str(error)))
        return seen
    report = manager.last_restore
    seen.damaged = [] if report is None else [entry.reason for entry in report.damaged]
    seen.digest = toy.digest()
    counts: collections.Counter[str] = collections.Counter()
    if script.trace:
        _count(counts)
    began = time.monotonic()
    for step in script.saves:
        toy.step()
        if rank == 0 and script.known:
            note(script.known, step, toy.digest())
        if mine and step == script.armed:
            arm(script.fault)
        try:
            handle = manager.save(step, toy.state, publish=script.publish)
            try:
                manager.wait()
            finally:
                if handle.committed.done() and handle.committed.exception() is None:
                    seen.committed.append(step)
        except CkptError as error:
            seen.errors.append((step, type(error).__name__, str(error)))
    seen.took = time.monotonic() - began
    seen.passed = dict(counts)
    if not script.close:
        return seen
    try:
        manager.close()
    except CkptError as error:
        seen.errors.append((None, type(error).__name__, str(error)))
    return seen


def note(folder: str, step: int, digest: str) -> None:
    """Remember what a step holds, before anything of it is written."""
    with Path(folder, f"{step}.txt").open("a") as file:
        file.write(f"{digest}\n")


def restore_all(rank: int, world: int, roots: list[str], options: Any) -> list[Seen]:
    """Restore from one root after the other; a pair of processes serves many cells."""
    return [train(rank, world, Script(root=root, options=options, deadline=30.0)) for root in roots]


def _count(counts: collections.Counter[str]) -> None:
    """Count every pass of a fault point from here on."""
    original = faultpoints.hit

    def counting(point: str) -> None:
        counts[point] += 1
        original(point)

    for module in list(sys.modules.values()):
        if getattr(module, "hit", None) is original:
            module.hit = counting  # type: ignore[attr-defined]


def _set_clock(year: int) -> None:
    """Make every stamp that this process writes one of another year."""
    real = ckpt.envelope.datetime

    class Shifted(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.now(tz).replace(year=year, month=1, day=1)

    ckpt.envelope.datetime = Shifted  # type: ignore[misc]
