"""What the checkpoint functions ask of an engine, so that any engine can use them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

WeightFormat = Literal["hf", "dcp"]


@runtime_checkable
class EngineLike(Protocol):
    """The part of an engine that saving and loading an adapter needs.

    :class:`~archon_lora.engine.ArchonEngine` has it, and so does any object with these attributes.

    All members are read, none is set. ``config`` is the engine's settings: ``path`` (the base
    model's directory) is read, and ``barrier_timeout`` (seconds) where there is one.
    """

    @property
    def cpu_group(self) -> dist.ProcessGroup | None:
        """A gloo group over all ranks for checkpoints alone; None for a single process."""
        ...

    @property
    def model_parts(self) -> list[nn.Module]:
        """The model, or this rank's pipeline stages."""
        ...

    @property
    def optimizer(self) -> Optimizer | None:
        """None where the engine does not train."""
        ...

    @property
    def lr_scheduler(self) -> Any:
        """Has ``state_dict()`` and ``load_state_dict()``; or None."""
        ...

    @property
    def state_dict_adapter(self) -> Any:
        """Maps names to HuggingFace's, as :class:`~archon_lora.models.BaseStateDictAdapter`."""
        ...

    @property
    def model_config(self) -> Any:
        """The model's own configuration."""
        ...

    @property
    def config(self) -> Any:
        """The engine's settings."""
        ...

    @property
    def lora_config(self) -> Any:
        """The adapter's settings; None means that LoRA is off."""
        ...

    def get_version(self) -> int:
        """The policy version that the weights stand for."""
        ...

    def set_version(self, version: int) -> None:
        """Say which policy version the weights stand for."""
        ...


class SavesPretrained(Protocol):
    """A tokenizer or processor in the manner of ``transformers``."""

    def save_pretrained(self, save_directory: str) -> Any:
        """Write its files into the directory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveLoadMeta:
    """Where and how to save or load.

    Attributes:
        path: the directory.
        weight_format: ``"hf"`` is what other tools read: a PEFT adapter directory with LoRA, a
            HuggingFace model directory without. ``"dcp"`` is only the resumable checkpoint, which
            any number of ranks can load.
        with_optim: also the optimizer, the LR schedule, the RNG of every rank and the policy
            version, as a resumable checkpoint below ``<path>/train_state``.
        tokenizer: saved next to the weights through ``save_pretrained``, or None.
        processor: the same for a processor.
        base_model_path: what ``adapter_config.json`` names as the base model; None is the path
            that the engine was built from.
        naive_distributed: kept for callers of AReaL's engines; True is refused, because gathering
            everything on every rank is what this engine exists to avoid.
    """

    path: str
    weight_format: WeightFormat = "hf"
    with_optim: bool = False
    tokenizer: SavesPretrained | None = None
    processor: SavesPretrained | None = None
    base_model_path: str | None = None
    naive_distributed: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: an unknown format, an empty path, or ``naive_distributed``.
        """
        object.__setattr__(self, "path", str(self.path))
        if not self.path:
            msg = "path must name a directory, got an empty string"
            raise ValueError(msg)
        if self.weight_format not in get_args(WeightFormat):
            wanted = " or ".join(repr(f) for f in get_args(WeightFormat))
            msg = f"weight_format must be {wanted}, got {self.weight_format!r}"
            raise ValueError(msg)
        if self.naive_distributed:
            msg = "naive_distributed=True is not supported: set it to false; shards are gathered"
            raise ValueError(msg)


@runtime_checkable
class WeightSink(Protocol):
    """A rollout target that takes an adapter, e.g. a local generator or an engine's client."""

    def load_adapter(
        self, version: int, peft_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Serve this adapter from now on.

        Args:
            version: policy version; never seen before by this sink.
            peft_config: content of ``adapter_config.json``.
            tensors: by PEFT key, whole, on the host; the sink may keep them.
        """
        ...


@runtime_checkable
class FullWeightSink(Protocol):
    """A rollout target that takes a whole model, for an engine without LoRA."""

    def load_weights(self, version: int, tensors: Iterator[tuple[str, Tensor]]) -> None:
        """Serve these weights from now on.

        Args:
            version: policy version; never seen before by this sink.
            tensors: (HuggingFace name, whole host tensor), one at a time; must be used up.
        """
        ...
