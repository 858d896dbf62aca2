"""A rank's vote on a save, and what rank 0 makes of all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from .errors import PlanError, StateError
from .job import Job, file_record_of
from .save_record import rank_cost
from .stages import join_optimizers, join_schedules
from .state import decode_state, encode_state
from .types import AdapterExport, FileRecord

_JOINED: Final[Mapping[str, Callable[[Sequence[Any]], Any]]] = {
    "optimizer": join_optimizers,
    "scheduler": join_schedules,
}
"""Sections of which each rank of a parted state has its own part."""


def ballot(job: Job, record: FileRecord | None) -> dict[str, Any]:
    """What this rank says once its file is written.

    Args:
        job: the save.
        record: this rank's file, or None if it writes none.
    """
    said: dict[str, Any] = {
        "step": job.step,
        "kind": [job.resumable, job.publish],
        "fingerprint": job.layout.fingerprint,
        "file": None if record is None else asdict(record),
        "shared": {key: hashlib.sha256(data).hexdigest() for key, data in job.shared.items()},
        "mine": job.mine.decode("ascii"),
        "cost": rank_cost(job.handle.metrics),
    }
    if job.layout.parted:
        said["export"] = None if job.export is None else _digest(job.export)
        said["parts"] = {
            key: data.decode("ascii") for key, data in job.shared.items() if key in _JOINED
        }
    return said


def _digest(export: AdapterExport) -> str:
    rules = [asdict(rule) for rule in export.rules]
    document = [dict(export.peft_config), rules, export.experts]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def count(job: Job, ballots: Sequence[Mapping[str, Any]]) -> None:
    """Rank 0: refuse a save that is not the same save on all ranks.

    Notes the ranks' files in the job, and of a parted state the values of all parts together.

    Args:
        job: the save.
        ballots: what every rank said, by rank.

    Raises:
        PlanError: names the first difference.
    """
    first = ballots[0]
    parted = job.layout.parted
    for rank, said in enumerate(ballots):
        for what in ("step", "kind", "fingerprint"):
            if said[what] != first[what]:
                msg = (
                    f"ranks disagree about what is saved: {what} is {first[what]} on rank 0 "
                    f"and {said[what]} on rank {rank}"
                )
                raise PlanError(msg)
        for section, digest in first["shared"].items():
            if parted and section in _JOINED:
                continue
            if said["shared"].get(section) != digest:
                msg = (
                    f"{section} differs between rank 0 and rank {rank}; values that belong to "
                    "one rank go into TrainState(per_rank=...)"
                )
                raise PlanError(msg)
        if parted and said["export"] != first["export"]:
            msg = (
                f"the adapter export differs between rank 0 and rank {rank}: every stage must "
                "export the whole adapter (apply_lora() on the whole model, then split it), or "
                "give the same TrainState(export=...) on all ranks"
            )
            raise PlanError(msg)
        if (said["file"] is not None) != (rank in job.layout.writers):
            msg = f"rank {rank} wrote {said['file']}, the plan says otherwise"
            raise PlanError(msg)
        if said["file"] is not None:
            job.files[rank] = file_record_of(said["file"])
    if parted and job.resumable:
        job.shared = {**job.shared, **_together(ballots)}


def _together(ballots: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """The sections of all parts, as one optimizer and one schedule would have them."""
    try:
        return {
            section: encode_state(
                join([decode_state(said["parts"][section].encode()) for said in ballots])
            )
            for section, join in _JOINED.items()
        }
    except StateError as error:
        raise PlanError(str(error)) from error
