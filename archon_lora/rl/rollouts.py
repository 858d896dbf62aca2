"""Who samples, as the training loop sees it; and the trainer's own devices as one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch.distributed as dist
from torch import Tensor

from archon_lora.adapter import get_adapter_state_dict
from archon_lora.engine import ArchonEngine
from archon_lora.engine.agree import gather_json
from archon_lora.rl.rollout import Batch, RolloutQueue, merge, pack, unpack
from ckpt import SaveHandle

Make: TypeAlias = Callable[[int, int, int, Mapping[str, Tensor]], Batch]


class Rollouts(Protocol):
    """Samples batches ahead of the trainer.

    Every rank has one and makes the same calls in the same order; those that say so are
    collective.
    """

    def begin(self, version: int, served: Mapping[str, Any] | None) -> bool:
        """Say where the run stands before the first launch; collective.

        Args:
            version: the trainer's policy version.
            served: what the checkpoint says of the version that sampled last, or None.

        Returns:
            Whether the trainer has to publish its version first.
        """
        ...

    def policy(self, version: int) -> int:
        """Which version samples what is launched while the trainer is at ``version``."""
        ...

    def wants(self, version: int) -> bool:
        """Whether the version that the trainer has just reached must be published for sampling."""
        ...

    def published(self, version: int, handle: SaveHandle) -> None:
        """A wanted version is on its way to storage."""
        ...

    def launch(self, step: int, version: int, first: int) -> None:
        """Begin the batch for ``step``; collective.

        Args:
            step: the optimizer step that will train on it.
            version: what :meth:`policy` said.
            first: position of its first prompt.
        """
        ...

    def pending(self) -> list[int]:
        """Steps whose batches were launched and not taken, in order."""
        ...

    def take(self, step: int) -> Batch:
        """Wait for a whole batch; collective.

        Raises:
            TimeoutError: it was not ready in time.
        """
        ...

    def report(self) -> dict[str, Any]:
        """What goes into the metrics of the step that ends; on the first rank."""
        ...

    def close(self) -> None:
        """Drop what has not begun and wait, not for ever, for what has."""
        ...


class LocalRollouts:
    """Every rank samples its share on its own device; satisfies :class:`Rollouts`."""

    def __init__(
        self,
        engine: ArchonEngine,
        make: Make,
        *,
        group: dist.ProcessGroup | None,
        max_staleness: int,
        timeout: float,
    ) -> None:
        """Start the thread that samples.

        Args:
            engine: whose adapter samples.
            make: samples this rank's share: (step, version, first prompt, adapter) to a batch.
            group: ranks that exchange their shares.
            max_staleness: optimizer steps by which a batch's policy may lag.
            timeout: seconds to wait for a share.
        """
        self._engine = engine
        self._make = make
        self._queue = RolloutQueue(max_staleness=max_staleness, timeout=timeout)
        self._group = group
        self._timeout = timeout
        self._gathered: tuple[int, Mapping[str, Tensor]] | None = None

    def begin(self, version: int, served: Mapping[str, Any] | None) -> bool:
        """See :class:`Rollouts`."""
        return False

    def policy(self, version: int) -> int:
        """See :class:`Rollouts`."""
        return version

    def wants(self, version: int) -> bool:
        """See :class:`Rollouts`."""
        return False

    def published(self, version: int, handle: SaveHandle) -> None:
        """See :class:`Rollouts`."""

    def launch(self, step: int, version: int, first: int) -> None:
        """See :class:`Rollouts`."""
        if self._gathered is None or self._gathered[0] != version:
            self._gathered = version, get_adapter_state_dict(self._engine.model, full=True)
        make = partial(self._make, step, version, first, self._gathered[1])
        self._queue.launch(step, version, make)

    def pending(self) -> list[int]:
        """See :class:`Rollouts`."""
        return self._queue.pending()

    def take(self, step: int) -> Batch:
        """See :class:`Rollouts`."""
        shares = gather_json(self._group, pack(self._queue.take(step)), timeout=self._timeout)
        return merge([unpack(part) for part in shares])

    def report(self) -> dict[str, Any]:
        """See :class:`Rollouts`."""
        return {}

    def close(self) -> None:
        """See :class:`Rollouts`."""
        self._queue.close()
