"""What a version's model must answer: a short prompt and the log-probabilities of its tokens.

The trainer records a :class:`Probe` when it publishes. Whoever loads the version into an engine
sends the prompt and compares: an engine may say that it loaded an adapter and serve another one,
or none. The record is the member ``probe`` of the version's manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ckpt.envelope import Fields
from ckpt.errors import ConfigError, DamagedError

PROBE_SCHEMA: Final = 1
"""The newest form of the record; it stands in the record as ``schema``."""

DEFAULT_TOLERANCE: Final = 0.05
"""Nats. Engines in bfloat16 were seen to be off by 0.01 to 0.035 from a trainer in float32."""

MAX_TOKENS: Final = 4096
_DTYPE_MAX: Final = 32


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt and what the model says of it.

    Attributes:
        token_ids: the prompt, at least two tokens.
        logprobs: natural logarithms of the probabilities of tokens 1 to n-1, each given the ones
            before it, with the adapter; one fewer than there are tokens.
        base_logprobs: the same without the adapter, or None if it was not recorded.
        tolerance: by how much an engine's answer may be off, as :func:`distance` measures it.
        dtype: in which the trainer computed them, e.g. ``"float32"``; for people.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    base_logprobs: tuple[float, ...] | None = None
    tolerance: float = DEFAULT_TOLERANCE
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: one that cannot be; names it.
        """
        ids = self.token_ids
        if not isinstance(ids, tuple) or not 2 <= len(ids) <= MAX_TOKENS:
            _refuse("token_ids", f"must be a tuple of 2 to {MAX_TOKENS} token ids", ids)
        for item in ids:
            if type(item) is not int or item < 0:
                _refuse("token_ids", "must hold integers >= 0", item)
        _check_logprobs("logprobs", self.logprobs, len(ids) - 1)
        if self.base_logprobs is not None:
            _check_logprobs("base_logprobs", self.base_logprobs, len(ids) - 1)
        if type(self.tolerance) is not float or not 0.0 < self.tolerance < math.inf:
            _refuse("tolerance", "must be a finite float > 0", self.tolerance)
        if not isinstance(self.dtype, str) or not 1 <= len(self.dtype) <= _DTYPE_MAX:
            _refuse("dtype", f"must be a name of 1 to {_DTYPE_MAX} characters", self.dtype)

    @property
    def effect(self) -> float | None:
        """The adapter's :func:`distance` from the base; None if the base was not recorded."""
        if self.base_logprobs is None:
            return None
        return distance(self.logprobs, self.base_logprobs)

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON holds it; :meth:`from_dict` reads it."""
        return {
            "schema": PROBE_SCHEMA,
            "token_ids": list(self.token_ids),
            "logprobs": list(self.logprobs),
            "base_logprobs": None if self.base_logprobs is None else list(self.base_logprobs),
            "tolerance": self.tolerance,
            "dtype": self.dtype,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str = "probe") -> Probe:
        """Read a record.

        Args:
            record: what :meth:`to_dict` gave, from JSON.
            where: whose it is, for the message.

        Raises:
            DamagedError: a member that is missing, unknown or cannot be; names it.
        """
        fields = Fields(dict(record), where)
        schema = fields.integer("schema", 1)
        if schema > PROBE_SCHEMA:
            fields.refuse(
                "schema", f"is newer than {PROBE_SCHEMA}: upgrade the package to read it", schema
            )
        base = fields.raw("base_logprobs")
        tolerance = fields.raw("tolerance")
        if type(tolerance) not in (int, float):
            fields.refuse("tolerance", "must be a number", tolerance)
        try:
            probe = cls(
                token_ids=fields.integers("token_ids"),
                logprobs=_numbers(fields, "logprobs"),
                base_logprobs=None if base is None else _numbers(fields, "base_logprobs"),
                tolerance=float(tolerance),
                dtype=fields.text("dtype", _DTYPE_MAX),
            )
        except (ConfigError, OverflowError) as error:
            msg = f"{where}: {error}"
            raise DamagedError(msg) from None
        fields.done()
        return probe


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """How far two answers to one prompt are apart: root mean square over its tokens, in nats.

    NaN if either has one. The greatest difference would be no good measure: it grows with the
    prompt, and one improbable token in bfloat16 decides it.

    Raises:
        ConfigError: they have different lengths, so they are not of one prompt.
    """
    if len(one) != len(other):
        msg = f"answers of {len(one)} and {len(other)} tokens cannot be of one prompt"
        raise ConfigError(msg)
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=True)]
    return math.sqrt(math.fsum(squares) / len(squares)) if squares else 0.0


def _numbers(fields: Fields, name: str) -> tuple[float, ...]:
    value = fields.raw(name)
    if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
        fields.refuse(name, "must be a list of numbers", value)
    return tuple(float(item) for item in value)


def _check_logprobs(name: str, value: object, count: int) -> None:
    if not isinstance(value, tuple) or len(value) != count:
        _refuse(name, f"must be a tuple of {count} numbers, one fewer than there are tokens", value)
    for item in value:
        if type(item) is not float or not math.isfinite(item):
            _refuse(name, "must hold finite floats", item)


def _refuse(name: str, rule: str, value: object) -> NoReturn:
    msg = f"Probe.{name} {rule}, got {repr(value)[:120]}"
    raise ConfigError(msg)
