"""The parts of a trainer's state that a restore can take by themselves."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum, unique

from .errors import ConfigError


@unique
class Part(StrEnum):
    """One part of a :class:`~ckpt.train_state.TrainState`; each equals its name as a text.

    Together they are all that a checkpoint holds. Their values are the names that
    ``restore(parts=...)`` takes.
    """

    MODEL = "model"
    """What trains: the adapter (or the whole model), with its persistent buffers."""
    OPTIMIZER = "optimizer"
    """Moments and step counts, and the groups' hyperparameters, learning rate included."""
    SCHEDULER = "scheduler"
    """The learning rate's schedule."""
    EXTRA = "extra"
    """The values that are equal on all ranks, such as ``policy_version``."""
    RNG = "rng"
    """Python's, NumPy's, torch's and CUDA's random number generators of each rank."""
    DATALOADER = "dataloader"
    """Each rank's data position."""
    PER_RANK = "per_rank"
    """The objects whose state differs from rank to rank."""


ALL_PARTS: frozenset[Part] = frozenset(Part)
"""Everything; ``ALL_PARTS - {"optimizer"}`` leaves one out."""


def check_parts(parts: Collection[str] | None) -> frozenset[Part]:
    """The parts that a caller asks for; None means all of them.

    Raises:
        ConfigError: none at all, a name that is no part, or one text in the place of several.
    """
    if parts is None:
        return ALL_PARTS
    known = ", ".join(Part)
    if isinstance(parts, str) or not isinstance(parts, Collection):
        msg = f"parts must be a set of names such as {{'model'}}, got {parts!r}"
        raise ConfigError(msg)
    wrong = [repr(part) for part in parts if part not in list(Part)]
    if wrong:
        msg = f"no part of a checkpoint is called {', '.join(wrong)}; the parts are {known}"
        raise ConfigError(msg)
    if not parts:
        msg = f"parts is empty, so nothing would be restored; the parts are {known}"
        raise ConfigError(msg)
    return frozenset(Part(part) for part in parts)
