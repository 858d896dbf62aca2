"""Settings of the engine: frozen, and checked once when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims

if TYPE_CHECKING:
    # Only the type checker needs the class: without LoRA its module must never be imported.
    from archon_lora.config import LoRAConfig

Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]
OnNonFinite = Literal["raise", "skip"]
Reference = Literal["base", "warm-start"]
PipelineSchedule = Literal["1f1b", "gpipe", "interleaved"]


def _require(ok: bool, name: str, wanted: str, got: object) -> None:
    if not ok:
        msg = f"{name} must be {wanted}, got {got!r}"
        raise ValueError(msg)


def _is_number(value: object) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]  # checked just above


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """AdamW and the schedule of its learning rate.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay; 0 suits adapters, whose B starts at zero.
        grad_clip: largest gradient norm; ``None`` measures it and never clips.
        norm_type: 2 or ``math.inf``; which norm is measured and clipped.
        schedule: what follows the warm-up: ``constant``, or a decay (``linear``, ``cosine``) from
            ``lr`` to ``min_lr_ratio * lr`` that ends at ``total_steps``.
        warmup_steps: updates over which the rate rises linearly to ``lr``.
        total_steps: updates of the whole run; needed by a decay.
        min_lr_ratio: the floor of a decay as a fraction of ``lr``.
        on_nonfinite: what a gradient norm of NaN or infinity does. ``"raise"`` stops the run;
            ``"skip"`` drops the update (parameters, moments and schedule stay as they are) and
            reports it. Every rank sees the same norm, so all of them decide alike.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    norm_type: float = 2.0
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    min_lr_ratio: float = 0.0
    on_nonfinite: OnNonFinite = "raise"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value out of range; names the field, what was given and what is wanted.
        """
        _require(_is_number(self.lr) and self.lr > 0, "lr", "a number > 0", self.lr)
        _require(
            len(self.betas) == 2 and all(_is_number(b) and 0 <= b < 1 for b in self.betas),
            "betas",
            "two numbers in [0, 1)",
            self.betas,
        )
        object.__setattr__(self, "betas", (float(self.betas[0]), float(self.betas[1])))
        _require(_is_number(self.eps) and self.eps > 0, "eps", "a number > 0", self.eps)
        decay = self.weight_decay
        _require(_is_number(decay) and decay >= 0, "weight_decay", "a number >= 0", decay)
        clip = self.grad_clip
        _require(
            clip is None or (_is_number(clip) and clip > 0),
            "grad_clip",
            "a number > 0, or None for no clipping",
            clip,
        )
        _require(self.norm_type in (2, math.inf), "norm_type", "2 or inf", self.norm_type)
        _require(
            self.schedule in get_args(Schedule),
            "schedule",
            f"one of {', '.join(get_args(Schedule))}",
            self.schedule,
        )
        _require(
            _is_count(self.warmup_steps, 0), "warmup_steps", "an integer >= 0", self.warmup_steps
        )
        total = self.total_steps
        _require(
            total is None or _is_count(total, self.warmup_steps + 1),
            "total_steps",
            f"an integer above warmup_steps ({self.warmup_steps}), or None",
            total,
        )
        _require(
            self.schedule == "constant" or total is not None,
            "total_steps",
            f"given for schedule={self.schedule!r}, which decays until that update",
            total,
        )
        floor = self.min_lr_ratio
        _require(_is_number(floor) and 0 <= floor <= 1, "min_lr_ratio", "in [0, 1]", floor)
        _require(
            self.on_nonfinite in get_args(OnNonFinite),
            "on_nonfinite",
            f"one of {', '.join(get_args(OnNonFinite))}",
            self.on_nonfinite,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an :class:`~archon_lora.engine.ArchonEngine` is built from.

    Attributes:
        path: a HuggingFace model directory (config.json and safetensors).
        base_name: what checkpoints and ``adapter_config.json`` call the base model, e.g. its name
            on a hub; None is ``path``.
        dtype: dtype of the base model's weights; adapters keep their own
            (``lora.adapter_dtype``, fp32 by default). With ``bfloat16`` the blocks compute in
            bf16 and gradients are reduced in fp32.
        lora: the adapter; ``None`` is full fine-tuning.
        reference: what ``logprobs(..., reference=True)`` computes with: the frozen ``base`` alone,
            or the adapter of the ``warm-start``, frozen as it was then (a policy that begins with
            an adapter is to stay near that policy, not near the bare base). The second takes
            the memory of one more adapter without optimizer state, and lies in every checkpoint.
        parallel: how the ranks are laid out; by default all of them share one copy (FSDP2).
        pp_schedule: the order in which micro batches pass the stages of a pipeline
            (``parallel.pp``): torch's 1F1B or GPipe, or interleaved 1F1B for several stages a rank.
        pp_stages: stages on each rank of a pipeline.
        optimizer: ``None`` for an engine that only runs forward (a reference or a scorer).
        activation_checkpointing: recompute each block in the backward pass.
        compile: compile each block.
        compile_backend: backend for ``torch.compile``; ``None`` is torch's default.
        micro_batches: parts that a batch is split into for gradient accumulation.
        seed: seeds the dropout masks, with the rank added. Adapters start from ``lora.seed``.
        device: ``auto`` takes CUDA where there is a device.
        barrier_timeout: seconds that a rank waits for the others around a save or load.
        transfer_timeout: seconds that one transfer between ranks may take there.
        temperature: logits are divided by it before log-probabilities are taken.
    """

    path: str
    base_name: str | None = None
    dtype: Dtype = "float32"
    lora: LoRAConfig | None = None
    reference: Reference = "base"
    parallel: ParallelDims = field(default_factory=ParallelDims)
    pp_schedule: PipelineSchedule = "1f1b"
    pp_stages: int = 1
    optimizer: OptimizerConfig | None = field(default_factory=OptimizerConfig)
    activation_checkpointing: bool = False
    compile: bool = False
    compile_backend: str | None = None
    micro_batches: int = 1
    seed: int = 0
    device: Device = "auto"
    barrier_timeout: float = 120.0
    transfer_timeout: float = 600.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: a value out of range; names the field, what was given and what is wanted.
            ParallelConfigError: a layout that does not go with the adapter.
        """
        object.__setattr__(self, "path", str(self.path))
        _require(bool(self.path), "path", "a model directory", self.path)
        for name, kind in (
            ("dtype", Dtype),
            ("device", Device),
            ("reference", Reference),
            ("pp_schedule", PipelineSchedule),
        ):
            value: Any = getattr(self, name)
            _require(value in get_args(kind), name, f"one of {', '.join(get_args(kind))}", value)
        _require(
            self.optimizer is None or isinstance(self.optimizer, OptimizerConfig),
            "optimizer",
            "an OptimizerConfig, or None for an engine that does not train",
            self.optimizer,
        )
        _require(isinstance(self.parallel, ParallelDims), "parallel", "ParallelDims", self.parallel)
        for name in ("activation_checkpointing", "compile"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, "true or false", value)
        _require(
            _is_count(self.micro_batches, 1), "micro_batches", "an integer >= 1", self.micro_batches
        )
        _require(_is_count(self.pp_stages, 1), "pp_stages", "an integer >= 1", self.pp_stages)
        self._check_pipeline()
        _require(_is_count(self.seed, 0), "seed", "an integer >= 0", self.seed)
        for name in ("barrier_timeout", "transfer_timeout", "temperature"):
            value = getattr(self, name)
            _require(_is_number(value) and value > 0, name, "a number > 0", value)
        if self.lora is not None:
            from archon_lora.config import LoRAConfig

            _require(isinstance(self.lora, LoRAConfig), "lora", "a LoRAConfig, or None", self.lora)
            dropout = self.lora.dropout
            if dropout and self.parallel.tp > 1:
                msg = (
                    f"lora.dropout={dropout:g} does not go with parallel.tp={self.parallel.tp}: "
                    "ranks that share a layer would draw different masks for the same input, and "
                    "their copies of A would drift apart; set lora.dropout to 0"
                )
                raise ParallelConfigError(msg)
        _require(
            self.reference == "base" or self.lora is not None,
            "reference",
            "'base' without lora: only an adapter can be started from one",
            self.reference,
        )

    def _check_pipeline(self) -> None:
        """Refuse what a schedule cannot do.

        Raises:
            ParallelConfigError: says which number to change.
        """
        pp, parts, schedule = self.parallel.pp, self.micro_batches, self.pp_schedule
        if pp == 1 and self.pp_stages == 1:
            return
        msg = None
        if pp == 1 or (self.pp_stages > 1) != (schedule == "interleaved"):
            msg = (
                f"pp_schedule={schedule!r} with pp_stages={self.pp_stages} and parallel.pp={pp}: "
                "'interleaved' is for several stages on each rank of a pipeline, the others for one"
            )
        elif self.parallel.sequence_parallel:
            msg = "sequence_parallel does not go with parallel.pp: stages pass on whole sequences"
        elif schedule == "1f1b" and parts < pp:
            msg = (
                f"pp_schedule='1f1b' wants at least parallel.pp={pp} micro_batches, got {parts}; "
                "'gpipe' takes any number"
            )
        elif schedule == "interleaved" and parts % max(1, parts // pp):
            msg = (
                f"pp_schedule='interleaved' wants micro_batches to be a multiple of "
                f"parallel.pp={pp}, or to be below twice that, got {parts}"
            )
        if msg is not None:
            raise ParallelConfigError(msg)
