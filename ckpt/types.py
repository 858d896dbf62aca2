"""The records that every part of the package passes around: plain, frozen, JSON-ready."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

MODEL_PREFIX = "model."
"""Prefix of a parameter's or buffer's name in a checkpoint; the rest is its canonical FQN."""

OPTIM_PREFIX = "optim."
"""Prefix of an optimizer tensor: ``optim.<FQN>.<state key>``, e.g. ``optim.w.exp_avg``."""

ExpertForm = Literal["single", "stacked"]
"""How the adapters on a layer's experts lie in a PEFT file: each by itself, or all in one pair."""

EXPERT_FORMS: tuple[ExpertForm, ...] = ("single", "stacked")

BLOCK_BYTES = 8 * 1024 * 1024
"""Files carry a CRC32 per block of this many bytes, so that a range can be verified alone."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One contiguous piece of a tensor and where its bytes lie.

    Attributes:
        offsets: position of the piece in the global tensor, one entry a dimension.
        sizes: its extent, one entry a dimension; the bytes are row-major.
        file: path of the file, relative to the step's directory.
        start: first byte in the file (absolute, header included).
        end: one past the last byte.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A whole tensor as the manifest knows it.

    Attributes:
        name: checkpoint name, ``model.<FQN>`` or ``optim.<FQN>.<key>``.
        dtype: safetensors dtype code, e.g. ``"F32"`` or ``"BF16"``.
        shape: global shape.
        chunks: pieces that cover the tensor exactly once.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of a step or version: path relative to its directory, size, CRC32s."""

    name: str
    size: int
    crc32: int
    block_crc32: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which frozen base model an adapter belongs to.

    Attributes:
        name: the model's name or path as users and engines call it.
        config_hash: SHA-256 (hex) over the model's canonical config JSON.
    """

    name: str
    config_hash: str

    @classmethod
    def of(cls, value: BaseIdentity | Mapping[str, Any]) -> BaseIdentity:
        """An identity as a record, whichever way it was given.

        Raises:
            ConfigError: a mapping without the two fields.
        """
        from .errors import ConfigError

        if isinstance(value, BaseIdentity):
            return value
        try:
            return cls(name=str(value["name"]), config_hash=str(value["config_hash"]))
        except (KeyError, TypeError) as error:
            msg = f"base must be a BaseIdentity or have 'name' and 'config_hash', got {value!r}"
            raise ConfigError(msg) from error


@dataclass(frozen=True, slots=True)
class TensorRule:
    """How one PEFT tensor is made from one checkpoint tensor.

    Attributes:
        source: canonical FQN of the parameter (without ``model.``).
        key: PEFT key, ``base_model.model.….lora_A.weight``.
        scale: factor applied in fp32 before the cast to the export dtype.
        pad_dim: dimension of the rank that is zero-padded, or None.
        pad_to: extent of ``pad_dim`` after padding, or None.
        index: slice taken from dimension 0 (an expert), or None. Taken before padding, and
            ``pad_dim`` counts the dimensions that remain.
    """

    source: str
    key: str
    scale: float = 1.0
    pad_dim: int | None = None
    pad_to: int | None = None
    index: int | None = None


@dataclass(frozen=True, slots=True)
class AdapterExport:
    """Everything needed to turn a checkpoint into a PEFT adapter without the model.

    Attributes:
        peft_config: content of ``adapter_config.json``.
        rules: one rule for every tensor of ``adapter_model.safetensors``.
        others: canonical FQNs of tensors that are saved with it and belong to other adapters of the
            same model; they are left out of this adapter on purpose.
        experts: form in which adapters on experts are written (:mod:`ckpt.expert_form`). Rules and
            configuration are those of the single form all the same.
    """

    peft_config: Mapping[str, Any]
    rules: tuple[TensorRule, ...]
    others: tuple[str, ...] = ()
    experts: ExpertForm = "single"


@dataclass(frozen=True, slots=True)
class Retention:
    """What to keep after a commit.

    Attributes:
        latest: number of newest steps kept; at least 1.
        every: also keep steps whose number is a multiple of this, or None.
        versions: number of newest published versions kept, or None for all of them.
        best: also keep this many steps with the best value of ``metric``, or None.
        metric: name of the value, as ``save(metrics={name: value})`` gives it.
        mode: whether the greatest (``"max"``) or the smallest (``"min"``) value is best.
    """

    latest: int = 3
    every: int | None = None
    versions: int | None = None
    best: int | None = None
    metric: str | None = None
    mode: Literal["max", "min"] = "max"

    def __post_init__(self) -> None:
        """Refuse values that would delete the newest step.

        Raises:
            ConfigError: a count below 1, or ``best`` without a metric.
        """
        from .errors import ConfigError

        for name in ("latest", "every", "versions", "best"):
            value: int | None = getattr(self, name)
            if value is None and name != "latest":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                msg = f"Retention.{name} must be an integer >= 1, got {value!r}"
                raise ConfigError(msg)
        if (self.best is None) != (self.metric is None):
            msg = "Retention.best and Retention.metric belong together: set both or neither"
            raise ConfigError(msg)
        if self.mode not in ("max", "min"):
            msg = f"Retention.mode must be 'max' or 'min', got {self.mode!r}"
            raise ConfigError(msg)


@dataclass(slots=True)
class SaveMetrics:
    """What one save cost on this rank; filled in as it proceeds (None: it did not come to that).

    Attributes:
        step: the step number, or None for a publish without one.
        stall_ms: time that ``save()`` took from the caller; the next three are parts of it.
        wait_ms: waiting for a free slot, or for the ranks' word on ``when_busy``.
        plan_ms: finding or making the layout.
        copy_ms: copying the tensors, or handing the copy to the device.
        stage_bytes: bytes that were copied.
        write_ms: time to write this rank's file, checksums included.
        commit_ms: from then until the step existed: the other ranks' files, the vote, the
            manifest.
        publish_ms: time to make the version, its commit included.
        publish_lag_ms: from the call until the version existed.
        total_ms: from the call until everything had ended.
        planned: whether the layout was planned anew, with the other ranks.
        queue_depth: saves that were waiting or under way when this one came.
        skipped: whether ``when_busy`` left it out.
        store_requests: requests that this rank sent to the store for it, repetitions included
            (on a file system: operations on files).
        store_bytes: bytes that went to the store or came from it.
        extra: room for callers.
    """

    step: int | None = None
    stall_ms: float = 0.0
    wait_ms: float = 0.0
    plan_ms: float = 0.0
    copy_ms: float = 0.0
    stage_bytes: int = 0
    write_ms: float | None = None
    commit_ms: float | None = None
    publish_ms: float | None = None
    publish_lag_ms: float | None = None
    total_ms: float | None = None
    planned: bool = False
    queue_depth: int = 0
    skipped: bool = False
    store_requests: int | None = None
    store_bytes: int | None = None
    extra: dict[str, float] = field(default_factory=dict)
