"""ArchonEngine: a small trainer on FSDP2, with or without LoRA.

Without LoRA this module and all that it imports leave the LoRA code alone; it is imported only
inside ``if ... lora is not None``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from archon_lora.errors import EngineNotReady
from archon_lora.models import BaseStateDictAdapter, base_fingerprint
from archon_lora.placement import reshard

from .agree import attempt
from .batch import (
    Batch,
    LossFn,
    WeightFn,
    batch_rows,
    check_same_rows,
    default_weight,
    reduce_losses,
    split_batch,
    total_weight,
)
from .build import BuiltModel, build_model, trainable_params
from .config import EngineConfig, OptimizerConfig
from .groups import Groups, close_groups, open_groups
from .inference import as_reference, eval_logits, next_token_logprobs
from .schedule import build_optimizer, build_scheduler
from .types import FullWeightSink, SaveLoadMeta, WeightSink
from .update import clipped_update

if TYPE_CHECKING:
    from archon_lora.config import LoRAConfig
    from ckpt import CheckpointManager, SaveHandle, TrainState

_T = TypeVar("_T")


class ArchonEngine:
    """Trains one model over all ranks of a process group.

    :meth:`initialize` comes first and :meth:`close` last. Every rank must make the calls that
    compute, save or load. Satisfies :class:`~archon_lora.engine.EngineLike`.

    Attributes:
        config: the settings.
        lora_config: the adapter's settings, None for full fine-tuning.
        extra: values that go into every checkpoint, equal on all ranks and JSON-able;
            ``policy_version`` is among them.
        sinks: rollout targets that :meth:`update_weights` serves.
        manager: where :meth:`update_weights` publishes, or None.
        skipped_updates: updates dropped because of a gradient that was not finite.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.lora_config: LoRAConfig | None = config.lora
        self.extra: dict[str, Any] = {"policy_version": 0}
        self.sinks: list[WeightSink | FullWeightSink] = []
        self.manager: CheckpointManager | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.lr_scheduler: LambdaLR | None = None
        self.skipped_updates = 0
        self._built: BuiltModel | None = None
        self._groups: Groups | None = None

    def initialize(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Make groups, model, optimizer and schedule; seeds this process's torch generators.

        Args:
            process_group: ranks that train together; None is all of them.

        Raises:
            EngineNotReady: the engine is initialised already.
            ModelLoadError: the model directory cannot be loaded.
            TargetError: the adapter's targets do not fit the model.
            PeerFailed: one of these happened on another rank.
        """
        if self._groups is not None:
            msg = "initialize() was called twice on this engine; close() it first"
            raise EngineNotReady(msg)
        groups = open_groups(self.config, process_group)
        what, patience = f"building {self.config.path}", self.config.barrier_timeout
        try:
            # Nothing in there is collective, so a rank that fails would leave the others waiting.
            with attempt(groups.cpu_group, what=what, timeout=patience):
                self._built = build_model(self.config, groups.mesh, groups.device)
        except BaseException:
            self._built = None
            close_groups(groups)
            raise
        self._groups = groups
        if self.config.optimizer is not None:
            # Only what trains: the frozen base would cost two moments per weight.
            self.optimizer = build_optimizer(self.trainable_params(), self.config.optimizer)
            self.lr_scheduler = build_scheduler(self.optimizer, self.config.optimizer)
        # Ranks draw different dropout masks.
        torch.manual_seed(self.config.seed + groups.rank)

    def close(self) -> None:
        """Let go of the model and of the groups made here; a second call does nothing."""
        groups, self._groups = self._groups, None
        self._built = None
        self.optimizer = self.lr_scheduler = None
        if groups is not None:
            close_groups(groups)

    def __enter__(self) -> ArchonEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def model(self) -> nn.Module:
        """The sharded model; absent where it is split into pipeline stages.

        Raises:
            AttributeError: it is; see :attr:`model_parts`.
        """
        built = self._ready(self._built)
        if self.groups.mesh.pp is not None:
            msg = "with pipeline stages there is no engine.model: use engine.model_parts"
            raise AttributeError(msg)
        return built.parts[0]

    @property
    def model_parts(self) -> list[nn.Module]:
        """The model, or this rank's pipeline stages."""
        return list(self._ready(self._built).parts)

    @property
    def model_config(self) -> Any:
        """The model's own configuration."""
        return self._ready(self._built).model_config

    @property
    def state_dict_adapter(self) -> BaseStateDictAdapter:
        """Maps Archon's names to HuggingFace's."""
        return self._ready(self._built).state_dict_adapter

    @property
    def groups(self) -> Groups:
        """Process groups, mesh and device."""
        return self._ready(self._groups)

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """The gloo group that every barrier around a checkpoint uses."""
        return self.groups.cpu_group

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.groups.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.groups.world_size

    @property
    def dp_rank(self) -> int:
        """Which part of a batch this rank computes; ranks that share layers have the same."""
        return self.groups.dp_rank

    @property
    def dp_size(self) -> int:
        """Into how many parts a batch is split."""
        return self.groups.dp_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.groups.device

    @property
    def base_name(self) -> str:
        """What checkpoints and ``adapter_config.json`` call the base model."""
        return self.config.base_name or self.config.path

    @staticmethod
    def _ready(part: _T | None) -> _T:
        if part is None:
            msg = "the engine is not initialised: call initialize() first"
            raise EngineNotReady(msg)
        return part

    def trainable_params(self) -> list[nn.Parameter]:
        """The adapter's parameters, or all of them without LoRA.

        Raises:
            NoAdapterError: LoRA is on, but the model has no adapter.
        """
        return trainable_params(self.model_parts, has_lora=self.lora_config is not None)

    def get_version(self) -> int:
        """The policy version that the weights stand for."""
        return int(self.extra["policy_version"])

    def set_version(self, version: int) -> None:
        """Say which policy version the weights stand for.

        Raises:
            ValueError: not an integer >= 0.
        """
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            msg = f"the policy version must be an integer >= 0, got {version!r}"
            raise ValueError(msg)
        self.extra["policy_version"] = version

    def train_batch(
        self, batch: Batch, loss_fn: LossFn, *, loss_weight_fn: WeightFn = default_weight
    ) -> dict[str, float]:
        """One update: gradients, norm, step; arguments as in :meth:`forward_backward`.

        Returns:
            ``loss`` (mean over all ranks), ``grad_norm`` (before clipping), ``lr`` (of this
            update) and ``updated`` (0.0 if the update was skipped); equal on every rank.
        """
        optimizer, _, _ = self._training()
        optimizer.zero_grad(set_to_none=True)
        loss = self.forward_backward(batch, loss_fn, loss_weight_fn=loss_weight_fn)
        lr = float(optimizer.param_groups[0]["lr"])
        skipped = self.skipped_updates
        norm = self.optimizer_step()
        updated = float(self.skipped_updates == skipped)
        return {"loss": loss, "grad_norm": norm, "lr": lr, "updated": updated}

    def forward_backward(
        self, batch: Batch, loss_fn: LossFn, *, loss_weight_fn: WeightFn = default_weight
    ) -> float:
        """Add the gradients of a batch, micro batch by micro batch, to those already there.

        The gradient is that of ``sum(weight * loss) / sum(weight)`` over the micro batches of all
        ranks, so it does not depend on how the same rows are spread over ranks.

        Args:
            batch: this rank's rows, by ``dp_rank`` and ``dp_size``: tensors whose first dimension
                is the row. ``input_ids`` ``[B, S]``; ``attention_mask`` and ``positions`` are given
                to the model where present; the rest is for the loss.
            loss_fn: the mean loss of a micro batch. It must depend on the logits even where
                everything is masked: FSDP's collectives run in the backward pass.
            loss_weight_fn: weight of a micro batch; by default the number of rows.

        Returns:
            The weighted mean loss over all ranks.

        Raises:
            ValueError: a rank has too few rows for its micro batches, or all weights are zero.
        """
        groups = self.groups
        parts = split_batch(batch, self.config.micro_batches, groups)
        weights = [float(loss_weight_fn(part)) for part in parts]
        total = total_weight(weights, groups)
        for model in self.model_parts:
            model.train()
        losses: list[Tensor] = []

        def weighted(logits_BSV: Tensor, index: int) -> Tensor:
            loss = loss_fn(logits_BSV, parts[index])
            losses.append(loss.detach().double() * (weights[index] / total))
            # FSDP averages over ranks, but the weights already make a mean over all of them.
            return loss * (weights[index] / total * groups.dp_size)

        self._ready(self._built).passes.train(parts, weighted)
        return reduce_losses(losses, groups)

    def optimizer_step(self) -> float:
        """Measure and clip the gradients, update, advance the schedule, clear the gradients.

        Returns:
            The gradient norm before clipping, equal on every rank.

        Raises:
            EngineNotReady: the configuration has no optimizer.
            NonFiniteGradient: the norm is NaN or infinite and ``on_nonfinite`` is ``"raise"``.
                Parameters, moments and schedule are as before, and the gradients are cleared.
        """
        optimizer, scheduler, options = self._training()
        norm = clipped_update(optimizer, scheduler, options, group=self.groups.world)
        if not math.isfinite(norm):
            self.skipped_updates += 1
        return norm

    def _training(self) -> tuple[torch.optim.Optimizer, LambdaLR, OptimizerConfig]:
        if self.optimizer is None or self.lr_scheduler is None or self.config.optimizer is None:
            self._ready(self._built)
            msg = "this engine does not train: its configuration has optimizer=None"
            raise EngineNotReady(msg)
        return self.optimizer, self.lr_scheduler, self.config.optimizer

    @torch.no_grad()
    def forward(self, batch: Batch, *, reference: bool = False) -> Tensor:
        """Logits ``[B, S, V]`` of this rank's rows, without dropout or gradients.

        Args:
            batch: ``input_ids``, and ``attention_mask`` and ``positions`` where needed.
            reference: with what ``config.reference`` names instead of the policy (LoRA only).

        Raises:
            LoRANotEnabled: ``reference`` without LoRA.
            EngineNotReady: the reference is to be a warm start's adapter, and there was none.
        """
        built, rows = self._ready(self._built), batch_rows(batch, self.device)
        logits_BSV = self._logits(rows, reference=reference)
        shape = (*rows["input_ids"].shape, built.vocab_size)
        return built.passes.share(logits_BSV, shape, built.dtype)

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, reference: bool = False) -> Tensor:
        """Log-probability of each next token, fp32 ``[B, S - 1]``, at ``config.temperature``.

        Args:
            batch: as in :meth:`forward`.
            reference: as in :meth:`forward`.
        """
        rows = batch_rows(batch, self.device)
        logits_BSV, ids = self._logits(rows, reference=reference), rows["input_ids"]
        found = None
        if logits_BSV is not None:
            found = next_token_logprobs(logits_BSV, ids, self.config.temperature)
        shape = (ids.shape[0], ids.shape[1] - 1)
        return self._ready(self._built).passes.share(found, shape, torch.float32)

    def _logits(self, rows: Batch, *, reference: bool) -> Tensor | None:
        """Logits in eval mode; None where another stage of a pipeline has them."""
        check_same_rows(rows, self.groups)
        with as_reference(self) if reference else nullcontext():
            return eval_logits(self._ready(self._built), rows)

    def train_state(self, *, extra: dict[str, Any] | None = None, **parts: Any) -> TrainState:
        """Everything that a resume needs, for :class:`ckpt.CheckpointManager`.

        A restore into it also restores :meth:`get_version`.

        Args:
            extra: a dict to keep the shared values in from now on; by default ``self.extra``.
            parts: passed on to :class:`ckpt.TrainState`, e.g. ``dataloader`` or ``per_rank``.
        """
        from ckpt import TrainState

        if extra is not None:
            for name, value in self.extra.items():
                extra.setdefault(name, value)
            self.extra = extra
        self._reshard()
        return TrainState(
            # A list says that other ranks hold other parts.
            model=self.model if self.groups.mesh.pp is None else self.model_parts,
            optimizer=parts.pop("optimizer", self.optimizer),
            scheduler=parts.pop("scheduler", self.lr_scheduler),
            extra=self.extra,
            base=parts.pop("base", base_fingerprint(self.config.path, name=self.base_name)),
            **parts,
        )

    def _reshard(self) -> None:
        for model in self.model_parts:
            reshard(model)

    def save(self, meta: SaveLoadMeta) -> None:
        """Save as ``meta`` says; see :func:`archon_lora.engine.checkpoint.save`."""
        from .checkpoint import save

        self._reshard()
        save(self, meta)

    def load(self, meta: SaveLoadMeta) -> None:
        """Load as ``meta`` says; see :func:`archon_lora.engine.checkpoint.load`."""
        from .checkpoint import load

        self._reshard()
        load(self, meta)

    def update_weights(self, version: int, *, normalise: bool = True) -> SaveHandle | None:
        """Serve the weights as a policy version, which :meth:`get_version` gives afterwards.

        For arguments and errors see :func:`archon_lora.engine.weights.update_weights`.
        """
        from .weights import update_weights

        self._reshard()
        return update_weights(self, version, normalise=normalise)
