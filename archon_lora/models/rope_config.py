"""Rotary base and scaling as a HuggingFace ``config.json`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from archon_lora.errors import ModelLoadError

from .config_values import check_positive

RopeKind = Literal["linear", "llama3", "yarn"]

_NEEDED: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset({"factor"}),
}
_OPTIONAL: Final[Mapping[str, frozenset[str]]] = {
    "default": frozenset(),
    "linear": frozenset(),
    "llama3": frozenset({"original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "truncate",
        }
    ),
}
_SPELLINGS: Final = frozenset({"rope_type", "type", "rope_theta"})


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than those first trained on.

    Attributes:
        kind: ``"linear"``: all divided by ``factor``; ``"llama3"``: only long wavelengths, with a
            ramp between; ``"yarn"``: a ramp over the pairs, and a factor on cosine and sine.
        factor: the stretch.
        original_max_position_embeddings: length first trained on (llama3, yarn).
        low_freq_factor: llama3: waves longer than the length over this are stretched whole.
        high_freq_factor: llama3: waves shorter than the length over this stay.
        beta_fast: yarn: turns within the length above which a pair stays.
        beta_slow: yarn: turns below which a pair is stretched whole.
        truncate: yarn: the ramp's ends are rounded outwards to whole pairs.
        attention_factor: yarn: multiplies cosine and sine; None computes the paper's value.
    """

    kind: RopeKind
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ModelLoadError: a value with which there are no such frequencies.
        """
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            check_positive(f"rope scaling: {name}", getattr(self, name))
        if self.attention_factor is not None:
            check_positive("rope scaling: attention_factor", self.attention_factor)
        if self.kind != "linear":
            check_positive(
                "rope scaling: original_max_position_embeddings",
                self.original_max_position_embeddings,
            )
        if self.kind == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            msg = (
                f"config.json: rope scaling: high_freq_factor {self.high_freq_factor!r} must be "
                f"above low_freq_factor {self.low_freq_factor!r}"
            )
            raise ModelLoadError(msg)


def read_rope(raw: Mapping[str, Any], *, default_theta: float) -> tuple[float, RopeScaling | None]:
    """Base and scaling from either spelling.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``.

    Args:
        raw: the parsed ``config.json``.
        default_theta: base of a configuration that names none.

    Returns:
        The base and the scaling, None where there is none.

    Raises:
        ModelLoadError: two bases, a scaling that is not computed here, or values it cannot have.
    """
    theta = raw.get("rope_theta")
    scaling: RopeScaling | None = None
    for key in ("rope_scaling", "rope_parameters"):
        entry = raw.get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            msg = f"config.json: {key} must be an object or null, got {entry!r}"
            raise ModelLoadError(msg)
        inner = entry.get("rope_theta")
        if inner is not None and theta is not None and inner != theta:
            msg = f"config.json: rope_theta is {theta!r}, but {key}.rope_theta is {inner!r}"
            raise ModelLoadError(msg)
        theta = theta if inner is None else inner
        found = _scaling(entry, key, raw)
        if found is not None and scaling is not None and found != scaling:
            msg = "config.json: rope_scaling and rope_parameters ask for different scalings"
            raise ModelLoadError(msg)
        scaling = scaling if found is None else found
    return default_theta if theta is None else theta, scaling


def _scaling(entry: Mapping[str, Any], key: str, raw: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling of one entry; every key in it must be one that counts here."""
    # transformers 4 wrote "type" before it wrote "rope_type".
    kind = entry.get("rope_type", entry.get("type", "default"))
    given = {name for name, value in entry.items() if value is not None} - _SPELLINGS
    if kind not in _NEEDED or given - _NEEDED[kind] - _OPTIONAL[kind]:
        unknown = sorted(given - _NEEDED[kind] - _OPTIONAL[kind]) if kind in _NEEDED else []
        what = f"rope_type {kind!r}" + (f" and {unknown}" if unknown else "")
        msg = (
            f"config.json: {key} with {what} is not supported: unscaled RoPE and "
            f"{', '.join(get_args(RopeKind))} are computed"
        )
        raise ModelLoadError(msg)
    if missing := sorted(_NEEDED[kind] - given):
        msg = f"config.json: {key} with rope_type {kind!r} lacks {', '.join(missing)}"
        raise ModelLoadError(msg)
    if kind == "default":
        return None
    values = {name: entry[name] for name in given}
    if kind != "linear":
        # A length beside the entry comes before the one in it, as transformers reads them.
        length = raw.get("original_max_position_embeddings") or values.get(
            "original_max_position_embeddings"
        )
        values["original_max_position_embeddings"] = (
            raw.get("max_position_embeddings") if length is None else length
        )
    return RopeScaling(kind=kind, **values)
