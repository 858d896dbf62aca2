"""Hyperparameters that decoders of all families share, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self

from archon_lora.errors import ModelLoadError

from .config_values import check_count, check_flag, check_positive
from .hf_files import read_config
from .rope_config import RopeScaling, read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What one family computes and another does not; the defaults are Llama's.

    Attributes:
        qkv_bias: q, k and v have biases.
        out_bias: the attention's output projection has one.
        mlp_bias: the three feed-forward projections have them.
        qk_norm: every query and key head passes an RMSNorm before it is turned.
        offset_norms: RMSNorm multiplies by ``1 + weight``, in fp32 (Gemma).
        sandwich_norms: the outputs of attention and feed-forward pass a norm too (Gemma 2, 3).
        activation: of the gate of the feed-forward block.
        scale_embedding: embeddings are multiplied by ``sqrt(hidden_size)`` (Gemma).
        attention_scale: multiplies the scores; None for ``1 / sqrt(head_dim)``.
        attention_softcap: scores are bent to ``cap * tanh(score / cap)``; None leaves them.
        logit_softcap: the same of the output logits.
        windows: for each layer, most keys that a query sees, itself included; None for all of
            them. Empty: all layers see everything.
        local_rope_theta: base of the rotary frequencies, unscaled, of layers with a window; None
            where they turn as the others do.
    """

    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    offset_norms: bool = False
    sandwich_norms: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    scale_embedding: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    local_rope_theta: float | None = None

    def window(self, layer: int) -> int | None:
        """Most keys that a query of a layer sees, None for all."""
        return self.windows[layer] if self.windows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The values that decide what a decoder computes.

    A family subclasses it, adds its own fields with transformers' defaults, and says in
    :meth:`traits` what follows from them and in :meth:`refuse_unsupported` what it cannot do.

    Attributes:
        vocab_size: rows of the embedding and of the output head.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward block.
        num_hidden_layers: number of transformer blocks.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides ``num_attention_heads``.
        head_dim: width of one head; 0 stands for ``hidden_size / num_attention_heads``.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, None for not at all.
        rms_norm_eps: added to the mean square in every RMSNorm.
        tie_word_embeddings: the output head is the embedding matrix.
        max_position_embeddings: longest sequence the model was trained for (not enforced).
    """

    model_type: ClassVar[str]
    required: ClassVar[tuple[str, ...]] = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    """Keys without which a ``config.json`` is refused."""
    nullable: ClassVar[frozenset[str]] = frozenset()
    """Keys whose null is a value, and not the default's other name."""
    activation_keys: ClassVar[tuple[str, ...]] = ("hidden_act",)
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    default_rope_theta: ClassVar[float] = 10000.0

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768

    def __post_init__(self) -> None:
        """Check ranges and divisibility.

        Raises:
            ModelLoadError: a value that no model of the family can have.
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
            check_count(name, getattr(self, name))
        check_count("head_dim", self.head_dim, least=0)
        for name in ("rope_theta", "rms_norm_eps"):
            check_positive(name, getattr(self, name))
        check_flag("tie_word_embeddings", self.tie_word_embeddings)
        if not self.head_dim:
            if self.hidden_size % (2 * self.num_attention_heads):
                msg = (
                    f"config.json: hidden_size {self.hidden_size} must divide into "
                    f"{self.num_attention_heads} heads of even width (rotary pairs)"
                )
                raise ModelLoadError(msg)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2:
            msg = f"config.json: head_dim must be even (rotary pairs), got {self.head_dim}"
            raise ModelLoadError(msg)
        if self.num_attention_heads % self.num_key_value_heads:
            msg = (
                f"config.json: num_key_value_heads {self.num_key_value_heads} must divide "
                f"num_attention_heads {self.num_attention_heads}"
            )
            raise ModelLoadError(msg)
        self.check_family()

    def check_family(self) -> None:
        """Check the family's own fields.

        Raises:
            ModelLoadError: a value that no model of the family can have.
        """

    def traits(self) -> Traits:
        """What a model with these values computes."""
        return Traits()

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Read a ``config.json``, as a mapping or in a model directory.

        Both spellings of the rotary base are read: ``rope_theta`` and ``rope_scaling``
        (transformers 4) and ``rope_parameters`` (transformers 5).

        Args:
            source: the model directory or the parsed ``config.json``.

        Returns:
            The checked configuration.

        Raises:
            ModelLoadError: a key is missing, has a wrong value, or asks for something that this
                model does not compute.
        """
        raw = source if isinstance(source, Mapping) else read_config(Path(source))
        if raw.get("model_type") != cls.model_type:
            msg = (
                f"config.json: model_type is {raw.get('model_type')!r}, expected {cls.model_type!r}"
            )
            raise ModelLoadError(msg)
        missing = [key for key in cls.required if raw.get(key) is None]
        if missing:
            msg = f"config.json lacks {', '.join(missing)}"
            raise ModelLoadError(msg)
        for key in cls.activation_keys:
            if raw.get(key) is not None and raw[key] not in cls.activations:
                refuse(raw, key, f"the feed-forward block computes {cls.activations[0]}")
        if raw.get("quantization_config") is not None:
            refuse(raw, "quantization_config", "use the unquantised weights")
        if raw.get("attention_dropout"):
            refuse(raw, "attention_dropout", "attention has no dropout here; set it to 0")
        cls.refuse_unsupported(raw)
        values = {
            field.name: _hashable(raw[field.name])
            for field in fields(cls)
            if raw.get(field.name) is not None or (field.name in cls.nullable and field.name in raw)
        }
        values.setdefault("num_key_value_heads", raw["num_attention_heads"])
        values |= cls.read_rope(raw)
        return cls(**values)

    @classmethod
    def read_rope(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that say how heads are turned.

        Raises:
            ModelLoadError: a scaling that is not computed here.
        """
        theta, scaling = read_rope(raw, default_theta=cls.default_rope_theta)
        return {"rope_theta": theta, "rope_scaling": scaling}

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse, by name, what would change the numbers and this family does not compute.

        Raises:
            ModelLoadError: such a setting.
        """


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def refuse(raw: Mapping[str, Any], key: str, why: str) -> NoReturn:
    """Raise for a key whose value is not supported.

    Raises:
        ModelLoadError: always; it names the key, its value and the reason.
    """
    msg = f"config.json: {key}={raw[key]!r} is not supported: {why}"
    raise ModelLoadError(msg)


def refuse_windows(raw: Mapping[str, Any]) -> None:
    """Refuse sliding windows where every layer attends to the whole sequence.

    Raises:
        ModelLoadError: a window is switched on, or a layer's type asks for one.
    """
    if raw.get("use_sliding_window"):
        refuse(raw, "use_sliding_window", "every layer here attends to the whole sequence")
    layer_types = raw.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        refuse(raw, "layer_types", "every layer here is full_attention")
