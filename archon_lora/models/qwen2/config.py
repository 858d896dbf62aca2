"""Qwen2's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archon_lora.errors import ModelLoadError
from archon_lora.models.hf_files import read_config

DEFAULT_ROPE_THETA = 10000.0
"""What a Qwen2 ``config.json`` without any RoPE entry means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config:
    """The values that decide what a Qwen2 model computes.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward block.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides ``num_attention_heads``.
        rope_theta: base of the rotary frequencies.
        rms_norm_eps: added to the mean square in every RMSNorm.
        tie_word_embeddings: the output head is the embedding matrix.
        max_position_embeddings: longest sequence the model was trained for (not enforced).
    """

    model_type = "qwen2"

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rope_theta: float = DEFAULT_ROPE_THETA
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        """Check ranges and divisibility.

        Raises:
            ModelLoadError: a value that no Qwen2 model can have.
        """
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                msg = f"config.json: {name} must be an integer >= 1, got {value!r}"
                raise ModelLoadError(msg)
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                msg = f"config.json: {name} must be a number > 0, got {value!r}"
                raise ModelLoadError(msg)
        tie: Any = self.tie_word_embeddings
        if not isinstance(tie, bool):
            msg = f"config.json: tie_word_embeddings must be true or false, got {tie!r}"
            raise ModelLoadError(msg)
        if self.hidden_size % (2 * self.num_attention_heads):
            msg = (
                f"config.json: hidden_size {self.hidden_size} must divide into "
                f"{self.num_attention_heads} heads of even width (rotary pairs)"
            )
            raise ModelLoadError(msg)
        if self.num_attention_heads % self.num_key_value_heads:
            msg = (
                f"config.json: num_key_value_heads {self.num_key_value_heads} must divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
            raise ModelLoadError(msg)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Qwen2Config:
        """Read a ``config.json``, as a mapping or in a model directory.

        Both spellings of the rotary base are read: ``rope_theta`` (transformers 4) and
        ``rope_parameters`` (transformers 5).

        Args:
            source: the model directory or the parsed ``config.json``.

        Returns:
            The checked configuration.

        Raises:
            ModelLoadError: a key is missing, has a wrong value, or asks for something that this
                model does not compute (sliding windows, scaled RoPE, another activation, ...).
        """
        raw = source if isinstance(source, Mapping) else read_config(Path(source))
        if raw.get("model_type") != cls.model_type:
            msg = (
                f"config.json: model_type is {raw.get('model_type')!r}, expected {cls.model_type!r}"
            )
            raise ModelLoadError(msg)
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [key for key in required if raw.get(key) is None]
        if missing:
            msg = f"config.json lacks {', '.join(missing)}"
            raise ModelLoadError(msg)
        _refuse_unsupported(raw)
        optional = {
            key: raw[key]
            for key in ("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
            if raw.get(key) is not None
        }
        kv_heads = raw.get("num_key_value_heads")
        return cls(
            **{key: raw[key] for key in required},
            num_key_value_heads=raw["num_attention_heads"] if kv_heads is None else kv_heads,
            rope_theta=_rope_theta(raw),
            **optional,
        )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuse, by name, every setting that would change the numbers and is not implemented."""

    def refuse(key: str, why: str) -> None:
        msg = f"config.json: {key}={raw[key]!r} is not supported: {why}"
        raise ModelLoadError(msg)

    if raw.get("use_sliding_window"):
        refuse("use_sliding_window", "every layer here attends to the whole sequence")
    layer_types = raw.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        refuse("layer_types", "every layer here is full_attention")
    if raw.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "the feed-forward block computes silu")
    if raw.get("quantization_config") is not None:
        refuse("quantization_config", "use the unquantised weights")
    if raw.get("attention_dropout"):
        refuse("attention_dropout", "attention has no dropout here; set it to 0")
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim != raw["hidden_size"] // raw["num_attention_heads"]:
        refuse("head_dim", "heads are hidden_size / num_attention_heads wide")


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """The rotary base from either spelling; any scaling is refused by its name."""
    theta = raw.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        entry = raw.get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            msg = f"config.json: {key} must be an object or null, got {entry!r}"
            raise ModelLoadError(msg)
        # transformers 4 wrote "type" before it wrote "rope_type".
        kind = entry.get("rope_type", entry.get("type", "default"))
        unknown = set(entry) - {"rope_type", "type", "rope_theta"}
        if kind != "default" or unknown:
            what = f"rope_type {kind!r}" if kind != "default" else f"{sorted(unknown)}"
            msg = f"config.json: {key} with {what} is not supported: only unscaled RoPE is computed"
            raise ModelLoadError(msg)
        inner = entry.get("rope_theta")
        if inner is not None and theta is not None and inner != theta:
            msg = f"config.json: rope_theta is {theta!r}, but {key}.rope_theta is {inner!r}"
            raise ModelLoadError(msg)
        theta = theta if inner is None else inner
    return DEFAULT_ROPE_THETA if theta is None else theta
