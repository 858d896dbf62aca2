"""LoRAConfig: every LoRA setting, validated once."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch

from . import peft_config
from .errors import LoRAConfigError
from .frozen import FrozenMap

ALL_LINEAR: Final = "all-linear"
"""As ``target_modules``: every linear layer but the output head and MoE routers."""

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}
_INITS: Final = ("kaiming", "gaussian")
_TRAIN_FIELDS: Final = ("use_lora", "lora_rank", "lora_alpha", "target_modules", "peft_type")
_TRAIN_ALL: Final[tuple[Any, ...]] = ([], (), [ALL_LINEAR], (ALL_LINEAR,))
"""Ways in which AReaL's configs say every linear layer: the field is a list of strings there."""


@dataclass(frozen=True)
class LoRAConfig:
    """What to adapt, and how.

    Attributes:
        rank: inner dimension r of every adapter, unless ``rank_pattern`` says otherwise.
        alpha: numerator of the scaling: ``alpha / r``, with rsLoRA ``alpha / sqrt(r)``.
        dropout: probability that an input element of an adapter is zeroed in training.
        target_modules: a list of names (each matches the module of that name and any whose name
            ends in ``.<name>``), a regular expression that must match a whole name, or
            ``"all-linear"``. Names are those of the HuggingFace model.
        exclude_modules: a list or a regular expression, matched in the same way; wins.
        rank_pattern: rank by module: the first key matches whose regular expression equals the
            end of the name, after a dot or from its start.
        alpha_pattern: alpha by module, in the same way.
        use_rslora: scale by ``alpha / sqrt(r)`` (rank-stabilised LoRA).
        init: ``"kaiming"``, U(-1/sqrt(in), 1/sqrt(in)), or ``"gaussian"``, N(0, 1/r), for A. B is
            always zero.
        adapter_dtype: dtype in which A and B are kept, whatever that of the base. A dtype or its
            name. fp32 by default: in bf16 most small updates round to nothing.
        seed: with the parameter's name, the seed of its initial values.

    Raises:
        LoRAConfigError: a value that cannot work.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude_modules: str | Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    init: str = "kaiming"
    adapter_dtype: torch.dtype = torch.float32
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate every value and bring it into its one stored form."""
        put = object.__setattr__  # the documented way to normalise a field of a frozen dataclass
        put(self, "rank", _rank("rank", self.rank))
        put(self, "alpha", _alpha("alpha", self.alpha))
        put(self, "dropout", _dropout(self.dropout))
        put(self, "target_modules", _selector("target_modules", self.target_modules))
        if not self.target_modules:
            msg = (
                f"target_modules must name at least one module, got {self.target_modules!r}; "
                f"{ALL_LINEAR!r} adapts every linear layer"
            )
            raise LoRAConfigError(msg)
        put(self, "exclude_modules", _selector("exclude_modules", self.exclude_modules))
        ranks = _pattern("rank_pattern", self.rank_pattern)
        put(
            self, "rank_pattern", FrozenMap({k: _rank(f"rank_pattern[{k!r}]", v) for k, v in ranks})
        )
        alphas = _pattern("alpha_pattern", self.alpha_pattern)
        put(
            self,
            "alpha_pattern",
            FrozenMap({k: _alpha(f"alpha_pattern[{k!r}]", v) for k, v in alphas}),
        )
        _flag("use_rslora", self.use_rslora)
        if self.init not in _INITS:
            msg = f"init must be one of {', '.join(map(repr, _INITS))}, got {self.init!r}"
            raise LoRAConfigError(msg)
        put(self, "adapter_dtype", _dtype(self.adapter_dtype))
        if not _is_int(self.seed) or self.seed < 0:
            msg = f"seed must be an integer >= 0, got {self.seed!r}"
            raise LoRAConfigError(msg)

    def rank_for(self, name: str) -> int:
        """Rank of the module with this HF name."""
        key = _first_match(self.rank_pattern, name)
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_for(self, name: str) -> float:
        """Alpha of the module with this HF name."""
        key = _first_match(self.alpha_pattern, name)
        return self.alpha if key is None else self.alpha_pattern[key]

    def scaling_for(self, name: str) -> float:
        """Factor on ``B A x`` of the module with this HF name."""
        return scaling(self.rank_for(name), self.alpha_for(name), use_rslora=self.use_rslora)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """Build from a mapping of this class's own field names, e.g. a table of a TOML file.

        Raises:
            LoRAConfigError: a key that is no field, or a value that cannot work.
        """
        known = [f.name for f in fields(cls)]
        for name, value in values.items():
            # PEFT's names of what is refused on purpose: "unknown" would not say why.
            if name in peft_config.REFUSED and not peft_config.is_off(value):
                msg = f"{name}={value!r} is not supported: {peft_config.REFUSED[name]}"
                raise LoRAConfigError(msg)
        _refuse_unknown("LoRA setting", values, known)
        return cls(**values)

    @classmethod
    def from_train_config(cls, config: object) -> LoRAConfig | None:
        """Read the LoRA fields of AReaL's training config.

        Args:
            config: a mapping with only the fields ``use_lora, lora_rank, lora_alpha,
                target_modules, peft_type``, or an object that has them among its attributes.

        Returns:
            The settings, or None when ``use_lora`` is false. An empty ``target_modules`` and
            ``["all-linear"]`` mean every linear layer, as they do there.

        Raises:
            LoRAConfigError: a field is missing, unknown (mappings only) or cannot work.
        """
        values: dict[str, Any] = {}
        if isinstance(config, Mapping):
            _refuse_unknown("field of a training config's LoRA part", config, _TRAIN_FIELDS)
            values.update(config)
        else:
            values.update({n: getattr(config, n) for n in _TRAIN_FIELDS if hasattr(config, n)})
        _require("use_lora", values, "true or false")
        _flag("use_lora", values["use_lora"])
        if not values["use_lora"]:
            return None
        kind = values.get("peft_type", "lora")
        if not isinstance(kind, str) or kind.lower() != "lora":
            msg = f"peft_type must be 'lora', got {kind!r}"
            raise LoRAConfigError(msg)
        _require("lora_rank", values, "an integer >= 1")
        _require("lora_alpha", values, "a number > 0")
        targets = values.get("target_modules")
        return cls(
            rank=_rank("lora_rank", values["lora_rank"]),
            alpha=_alpha("lora_alpha", values["lora_alpha"]),
            target_modules=ALL_LINEAR if targets is None or targets in _TRAIN_ALL else targets,
        )

    def to_peft(
        self,
        *,
        base_model_name: str = "",
        target_modules: str | Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """The content of an ``adapter_config.json`` that computes the same.

        ``adapter_dtype`` and ``seed`` have no place in that format.

        Args:
            base_model_name: value of ``base_model_name_or_path``; empty is written as null.
            target_modules: written instead of this config's own, e.g. the names that matched.

        Returns:
            A JSON-able mapping, keys sorted; lists of names are sorted.
        """
        targets = self.target_modules if target_modules is None else target_modules
        excluded = self.exclude_modules
        return dict(
            sorted(
                {
                    "alpha_pattern": {k: _number(v) for k, v in self.alpha_pattern.items()},
                    "base_model_name_or_path": base_model_name or None,
                    "bias": "none",
                    "exclude_modules": (_written(excluded) if excluded else None),
                    "fan_in_fan_out": False,
                    "inference_mode": True,
                    "init_lora_weights": True if self.init == "kaiming" else self.init,
                    "layers_pattern": None,
                    "layers_to_transform": None,
                    "lora_alpha": _number(self.alpha),
                    "lora_dropout": self.dropout,
                    "modules_to_save": None,
                    "peft_type": "LORA",
                    "peft_version": peft_config.PEFT_VERSION,
                    "r": self.rank,
                    "rank_pattern": dict(self.rank_pattern),
                    "revision": None,
                    "target_modules": _written(targets),
                    "task_type": "CAUSAL_LM",
                    "use_dora": False,
                    "use_rslora": self.use_rslora,
                }.items()
            )
        )

    @classmethod
    def from_peft(
        cls,
        config: Mapping[str, Any],
        *,
        adapter_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> LoRAConfig:
        """Read the content of an ``adapter_config.json``.

        Args:
            config: the file's content, or ``peft.LoraConfig(...).to_dict()``.
            adapter_dtype: as in the class; PEFT's format does not say it.
            seed: as in the class; PEFT's format does not say it.

        Raises:
            LoRAConfigError: an option that is not supported (the reason is given), a field that
                is unknown and set, or a value that cannot work.
        """
        peft_config.check_fields(config)
        for name, wanted in (
            ("r", "an integer >= 1"),
            ("lora_alpha", "a number > 0"),
            ("target_modules", "a list, a regular expression or 'all-linear'"),
        ):
            _require(name, config, wanted)
        init = config.get("init_lora_weights", True)
        if init is not True and init != "gaussian":
            msg = (
                f"init_lora_weights must be true or 'gaussian', got {init!r}: the first output "
                "must equal the base model's, and the base weights must not change"
            )
            raise LoRAConfigError(msg)
        task = config.get("task_type")
        if task is not None and str(task).rpartition(".")[2] != "CAUSAL_LM":
            msg = f"task_type must be 'CAUSAL_LM' or null, got {task!r}"
            raise LoRAConfigError(msg)
        return cls(
            rank=_rank("r", config["r"]),
            alpha=_alpha("lora_alpha", config["lora_alpha"]),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=config["target_modules"],
            exclude_modules=config.get("exclude_modules") or (),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            use_rslora=config.get("use_rslora", False),
            init="kaiming" if init is True else "gaussian",
            adapter_dtype=adapter_dtype,
            seed=seed,
        )


def check_config(config: object) -> None:
    """Refuse what is no LoRAConfig, such as a mapping of settings (:class:`LoRAConfigError`)."""
    if not isinstance(config, LoRAConfig):
        msg = f"config must be a LoRAConfig, got {type(config).__name__}"
        raise LoRAConfigError(msg)


def scaling(rank: int, alpha: float, *, use_rslora: bool) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def pattern_matches(key: str, name: str) -> bool:
    """Whether a key of a rank or alpha pattern is for this HF module name, as PEFT decides it."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _first_match(patterns: Mapping[str, Any], name: str) -> str | None:
    return next((key for key in patterns if pattern_matches(key, name)), None)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _rank(name: str, value: Any) -> int:
    if not _is_int(value) or value < 1:
        msg = f"{name} must be an integer >= 1, got {value!r}"
        raise LoRAConfigError(msg)
    return int(value)


def _alpha(name: str, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        msg = f"{name} must be a finite number > 0, got {value!r}"
        raise LoRAConfigError(msg)
    return float(value)


def _dropout(value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value < 1.0:  # NaN fails the comparison
        msg = f"dropout must be a number >= 0 and < 1, got {value!r}"
        raise LoRAConfigError(msg)
    return float(value)


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        msg = f"{name} must be true or false, got {value!r}"
        raise LoRAConfigError(msg)


def _dtype(value: Any) -> torch.dtype:
    found = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or found not in _DTYPES.values():
        msg = f"adapter_dtype must be one of {', '.join(_DTYPES)}, got {value!r}"
        raise LoRAConfigError(msg)
    return found


def _selector(name: str, value: Any) -> str | tuple[str, ...]:
    """A list of names as a tuple, or a regular expression that compiles."""
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:  # PEFT takes it in any case
            if name != "target_modules":
                msg = f"{name} must be a list or a regular expression, got {value!r}"
                raise LoRAConfigError(msg)
            return ALL_LINEAR
        _compiles(name, value, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        msg = f"{name} must be a list of names or a regular expression, got {value!r}"
        raise LoRAConfigError(msg)
    for entry in value:
        if not isinstance(entry, str) or not entry:
            msg = f"{name} must hold names that are not empty, got {entry!r} in {value!r}"
            raise LoRAConfigError(msg)
    # A set has no order of its own, and the same settings must compare and print alike.
    ordered = sorted(value) if isinstance(value, (set, frozenset)) else value
    return tuple(dict.fromkeys(ordered))


def _pattern(name: str, value: Any) -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        msg = f"{name} must map regular expressions to numbers, got {value!r}"
        raise LoRAConfigError(msg)
    for key in value:
        if not isinstance(key, str) or not key:
            msg = f"{name} must have regular expressions as keys, got {key!r}"
            raise LoRAConfigError(msg)
        _compiles(f"{name} key", key, rf"(.*\.)?({key})$")
    return list(value.items())


def _compiles(name: str, given: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        msg = f"{name} {given!r} must be a valid regular expression: {error}"
        raise LoRAConfigError(msg) from error


def _require(name: str, values: Mapping[str, Any], wanted: str) -> None:
    if values.get(name) is None:
        msg = f"{name} must be given ({wanted}), got {'null' if name in values else 'nothing'}"
        raise LoRAConfigError(msg)


def _refuse_unknown(what: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [str(key) for key in values if key not in known]
    if unknown:
        msg = f"unknown {what}: {', '.join(unknown)}; known are {', '.join(known)}"
        raise LoRAConfigError(msg)


def _number(value: float) -> int | float:
    """Whole numbers as integers: PEFT and the engines declare ``lora_alpha`` an integer."""
    return int(value) if value.is_integer() else value


def _written(selector: str | Sequence[str]) -> str | list[str]:
    return selector if isinstance(selector, str) else sorted(selector)
