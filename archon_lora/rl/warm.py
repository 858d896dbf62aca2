"""How a run begins: where it left off, or with an adapter that exists already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archon_lora.errors import TrainConfigError
from archon_lora.names import REFERENCE_ADAPTER
from ckpt import CheckpointManager, TrainState
from ckpt.errors import ConfigError, DamagedError, NonFiniteError, ObjectNotFound, StateError

_WRONG_ADAPTER = (ConfigError, DamagedError, NonFiniteError, ObjectNotFound, StateError)


@dataclass(frozen=True, kw_only=True)
class WarmStartSection:
    """Where the adapter's first values come from.

    Attributes:
        url: a PEFT directory or a published version's, local or on any store; empty for random
            values. A run that goes on from a checkpoint of its own does not look at it.
        rescale: take an adapter of another ``alpha / rank`` and fold the difference into B.
        any_base: do not compare the base models' names.
        storage_options: passed to fsspec for ``url``; credentials are better left to the
            environment.
    """

    url: str = ""
    rescale: bool = False
    any_base: bool = False
    storage_options: Mapping[str, Any] = field(default_factory=dict)


_SLOT = f".adapters.{REFERENCE_ADAPTER}."

BASE_WEIGHTS = "base_weights"
"""In every checkpoint's ``extra``: the fingerprint of the base's weights."""


def resume(manager: CheckpointManager, state: TrainState, *, reference: str) -> int | None:
    """Go on from the newest committed step, if there is one; on every rank.

    Args:
        manager: of the run's root.
        state: what is restored.
        reference: what the policy is to stay near to, by the settings.

    Returns:
        The step, or None.

    Raises:
        TrainConfigError: the steps were made with another kind of reference.
        CkptError: no step fits for another reason, the store failed, or another rank did.
    """
    try:
        return manager.restore(state)
    except StateError as error:
        if _SLOT not in str(error):
            raise
        msg = (
            f"grpo.reference={reference!r} is not what the checkpoint was made with; say which it "
            f"was ('base' or 'warm-start'), or start over with another root: {error}"
        )
        raise TrainConfigError(msg) from error


def same_base(extra: dict[str, Any], weights: str, *, any_base: bool) -> None:
    """Compare the base's weights with those that the restored step was trained over.

    Args:
        extra: of the restored step; holds ``weights`` afterwards. Steps of earlier releases have
            no fingerprint, and any weights do.
        weights: :func:`archon_lora.models.weights_fingerprint` of the base as it is now.
        any_base: accept others.

    Raises:
        TrainConfigError: they differ.
    """
    saved = extra.get(BASE_WEIGHTS, weights)
    if saved != weights and not any_base:
        msg = (
            "model.path holds other weights than the checkpoint was trained over (fingerprint "
            f"{saved[:12]} when it was saved, {weights[:12]} now), although the config is the "
            "same; put the model back, start over with another root, or go on with "
            "checkpoint.any_base=true"
        )
        raise TrainConfigError(msg)
    extra[BASE_WEIGHTS] = weights


def begin(
    manager: CheckpointManager, state: TrainState, section: WarmStartSection
) -> dict[str, Any] | None:
    """Bring the adapter in, if the settings name one; on every rank.

    Returns:
        What was taken, for the checkpoints and the metrics; None if nothing was.

    Raises:
        TrainConfigError: there is no such adapter, or it does not fit; nothing was changed.
        CkptError: the store failed, or another rank did.
    """
    if not section.url:
        return None
    try:
        taken = manager.warm_start(
            state,
            section.url,
            rescale=section.rescale,
            any_base=section.any_base,
            storage_options=dict(section.storage_options) or None,
        )
    except _WRONG_ADAPTER as error:
        msg = f"warm_start.url does not name an adapter to begin with: {error}"
        raise TrainConfigError(msg) from error
    return {"url": taken.url, "version": taken.version, "digest": taken.digest}
