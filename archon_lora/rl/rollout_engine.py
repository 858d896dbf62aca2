"""Rollouts by an inference engine: the first rank drives it, all ranks get the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist

from archon_lora.engine.agree import agree, gather_json
from archon_lora.rl.fleet import Fleet
from archon_lora.rl.rollout import Batch, RolloutQueue, pack, unpack
from ckpt import SaveHandle


class EngineRollouts:
    """Samples come from replicas; satisfies :class:`~archon_lora.rl.rollouts.Rollouts`.

    What goes wrong on the first rank is raised on all of them.
    """

    def __init__(
        self,
        fleet: Fleet | None,
        *,
        group: dist.ProcessGroup | None,
        handover_every: int,
        max_staleness: int,
        batch_timeout: float,
        patience: float,
        closing: float,
    ) -> None:
        """Take over the replicas.

        Args:
            fleet: the replicas, on the first rank alone.
            group: the ranks that train.
            handover_every: a version is handed over every so many optimizer steps.
            max_staleness: optimizer steps by which a batch's policy may lag.
            batch_timeout: seconds for one batch.
            patience: seconds that the other ranks wait for the first one; more than that.
            closing: seconds that :meth:`close` waits for a batch that is under way.
        """
        self._fleet = fleet
        self._group = group
        self._every = handover_every
        self._patience = patience
        self._queue = RolloutQueue(
            max_staleness=max_staleness, timeout=batch_timeout, closing=closing
        )
        self._launched: set[int] = set()
        self._policy = 0

    def begin(self, version: int, served: Mapping[str, Any] | None) -> bool:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`.

        A version that this process cannot make any more, since it has trained on, is taken from
        where it was published; if it is gone, the present one takes its place.
        """
        due = version - version % self._every

        def found(fleet: Fleet) -> bool:
            fleet.ready()
            if due == version or served is None or served["policy_version"] != due:
                return False
            return fleet.adopt(due, served["name"])

        adopted = bool(self._from_first(found, "reaching the engine"))
        self._policy = due if adopted else version
        return not adopted

    def policy(self, version: int) -> int:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        return self._policy

    def wants(self, version: int) -> bool:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        return version % self._every == 0

    def published(self, version: int, handle: SaveHandle) -> None:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        self._policy = version
        if self._fleet is not None:
            self._fleet.published(version, handle)

    def launch(self, step: int, version: int, first: int) -> None:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        if self._fleet is not None:
            self._queue.launch(step, version, partial(self._fleet.make, step, version, first))
        self._launched.add(step)

    def pending(self) -> list[int]:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        return sorted(self._launched)

    def take(self, step: int) -> Batch:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`.

        Raises:
            RolloutsFailed: no replica gave samples of the right version.
            PeerFailed: that happened on the first rank.
        """
        what = f"sampling batch {step}"
        packed = self._from_first(lambda _: pack(self._queue.take(step)), what)
        self._launched.discard(step)
        return unpack(packed)

    def report(self) -> dict[str, Any]:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        return {} if self._fleet is None else self._fleet.tally.read()

    def close(self) -> None:
        """See :class:`~archon_lora.rl.rollouts.Rollouts`."""
        self._queue.close()
        if self._fleet is not None:
            self._fleet.close()

    def _from_first(self, work: Callable[[Fleet], Any], what: str) -> Any:
        """What the first rank finds, on all ranks; its error, too."""
        value, error = None, None
        if self._fleet is not None:
            try:
                value = work(self._fleet)
            except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
                error = caught
        agree(self._group, error, what=what, timeout=self._patience)
        return gather_json(self._group, value, timeout=self._patience)[0]
