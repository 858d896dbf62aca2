"""Which steps count: the ones on the chain of writers that leads to the newest epoch.

A stale writer may still add steps after a newer one resumed from an older point. Nothing is
deleted for that: the newer writer's record says where it resumed, and what an older epoch holds
beyond that point is abandoned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import DamagedError
from .manifest import WriterRecord


def committed_lineage(
    writers: Iterable[WriterRecord], steps: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The (step, epoch) pairs that a restore may choose from, newest first.

    Newest means: of the youngest epoch first, within an epoch the highest step first. Of an older
    epoch only the steps up to the one the next epoch in the chain resumed from are taken.

    Args:
        writers: the records of ``writers/``, in any order.
        steps: (step, epoch) of the steps found, in any order.

    Raises:
        DamagedError: two records of one epoch, or one that names a younger parent.
    """
    records: dict[int, WriterRecord] = {}
    for writer in writers:
        if writer.epoch in records:
            msg = f"two writer records claim epoch {writer.epoch}"
            raise DamagedError(msg)
        records[writer.epoch] = writer
    by_epoch: dict[int, set[int]] = {}
    for step, epoch in steps:
        by_epoch.setdefault(epoch, set()).add(step)

    lineage: list[tuple[int, int]] = []
    head: int | None = max(records, default=None)
    limit: int | None = None
    while head is not None:
        found = sorted(by_epoch.get(head, ()), reverse=True)
        lineage += [(step, head) for step in found if limit is None or step <= limit]
        record = records.get(head)
        if record is None or record.parent_epoch is None:
            break
        if record.parent_epoch >= head:
            msg = f"writer epoch {head} claims to resume from epoch {record.parent_epoch}"
            raise DamagedError(msg)
        limit = record.parent_step
        head = record.parent_epoch
    return lineage


def chain_end(records: Mapping[int, WriterRecord], head: int) -> int:
    """The epoch at which the chain that leads to ``head`` ends, as far as the records show it.

    If ``records`` lacks that epoch, nobody can say whether older ones belong to the chain.

    Args:
        records: the readable records by epoch, as :func:`committed_lineage` accepts them.
        head: the newest epoch; 0 if there is none.
    """
    while head in records and (parent := records[head].parent_epoch) is not None:
        head = parent
    return head
