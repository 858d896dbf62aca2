"""LoRA for AReaL's own ``ArchonEngine``: a class to put before it.

    class LoRAActor(ArchonLoRA, ArchonPPOActor): ...

What AReaL does stays AReaL's; this class hooks in where an adapter needs it:

==================================  ==============================================================
hook of AReaL's engine              here
==================================  ==============================================================
``_create_state_dict_adapter``      guarded: a save that would lose the adapter is an error
``_setup_parallelism``              adapters go in first, between meta device and sharding
``_materialize_and_load_weights``   adapters get their initial values afterwards
``_get_all_parameters``             the adapter's alone: optimizer and gradient norm
``save``, ``load``                  PEFT directory, resumable state; a whole model is refused
``update_weights``                  the adapter, versioned: :mod:`archon_lora.engine.areal_update`
==================================  ==============================================================

Without ``use_lora`` in its configuration an engine of this class is AReaL's own. AReaL is imported
only when weights are handed over, so this module can be read and tested without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import nn

from archon_lora.config import LoRAConfig
from archon_lora.errors import EngineNotReady, LoRAConfigError

from .agree import attempt, deadline_of
from .areal_names import GuardedNames, hf_module_names

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

    from ckpt import CheckpointManager, TrainState

    from .areal_update import LeasedVersions
    from .engine import ArchonEngine
    from .types import SaveLoadMeta

    class _Archon:
        """The attributes of AReaL's engine that are used here."""

        config: Any
        model: nn.Module
        model_parts: list[nn.Module]
        model_config: Any
        parallel_dims: Any
        optimizer: torch.optim.Optimizer
        lr_scheduler: Any
        rollout_engine: Any
        spec: Any

        def __init__(self, config: Any) -> None: ...
        def destroy(self) -> None: ...
        def get_version(self) -> int: ...
        def set_version(self, version: int) -> None: ...
        def save(self, meta: Any) -> None: ...
        def load(self, meta: Any) -> None: ...
        def update_weights(self, meta: Any) -> None: ...
        def _create_state_dict_adapter(self) -> Any: ...
        def _setup_parallelism(self, ac_config: Any, enable_compile: bool) -> None: ...
        def _materialize_and_load_weights(self) -> None: ...
        def _get_all_parameters(self) -> list[nn.Parameter]: ...
        def _check_rollout_engine_connected(self) -> None: ...
        def _offload_aware_context(self) -> AbstractContextManager[None]: ...

        @property
        def cpu_group(self) -> dist.ProcessGroup: ...

else:
    _Archon = object

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Where and how versions are handed over.

    Attributes:
        root: directory or URL in which each version is published, committed and kept while in use;
            None: AReaL's own ``meta.path`` is written and left to AReaL to delete.
        run: first part of the versions' names.
        in_flight: versions that rollouts may still use: AReaL's ``max_head_offpolicyness`` plus
            two. Older ones are given up.
        lease_s: seconds for which a version is protected from deletion, renewed with each update.
        dtype: of what is published.
        engine: ``"vllm"`` or ``"sglang"``: every replica has to prove by its own answers that it
            serves the version; None: AReaL's word is taken for it.
        load_timeout_s: seconds that the replicas may take to load.
    """

    root: str | None = field(default_factory=lambda: os.environ.get("ARCHON_LORA_ROOT") or None)
    run: str = field(default_factory=lambda: os.environ.get("ARCHON_LORA_RUN", "run"))
    in_flight: int = 4
    lease_s: float = 3600.0
    dtype: str = "bfloat16"
    engine: str | None = field(default_factory=lambda: os.environ.get("ARCHON_LORA_ENGINE") or None)
    load_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            LoRAConfigError: a value that cannot work.
        """
        if self.in_flight < 2:
            msg = f"in_flight must be >= 2 (the present version and the next), got {self.in_flight}"
            raise LoRAConfigError(msg)
        if self.engine not in (None, "vllm", "sglang"):
            msg = f"engine must be 'vllm', 'sglang' or None, got {self.engine!r}"
            raise LoRAConfigError(msg)
        if self.engine is not None and self.root is None:
            msg = (
                f"engine={self.engine!r} proves published versions, and root is None: set root "
                "(ARCHON_LORA_ROOT) too"
            )
            raise LoRAConfigError(msg)


class ArchonLoRA(_Archon):
    """Goes before AReaL's ``ArchonEngine`` (or an engine made from it) in a class's bases.

    Satisfies :class:`~archon_lora.engine.EngineLike` once it is initialised.

    Attributes:
        hand_over: where versions go; set in a subclass, or by ``ARCHON_LORA_ROOT``,
            ``ARCHON_LORA_RUN`` and ``ARCHON_LORA_ENGINE`` in the environment.
        lora_config: the adapter, from AReaL's ``use_lora``, ``lora_rank``, ``lora_alpha``,
            ``target_modules`` and ``peft_type``; None without ``use_lora``.
        extra: values that go into every checkpoint; ``policy_version`` is among them.
        handed_over: the last version that was handed over, or None.
        manager: publishes to ``hand_over.root``; None until the first hand-over.
        leased: the versions that rollouts may still use.

    Raises:
        LoRAConfigError: LoRA settings that cannot work.
    """

    hand_over: ClassVar[HandOver | None] = None

    def __init__(self, config: Any) -> None:
        self.lora_config: LoRAConfig | None = LoRAConfig.from_train_config(config)
        if self.lora_config is not None and getattr(config, "is_critic", False):
            msg = (
                "use_lora is not supported for a critic: its value head is new and would stay "
                "frozen at its random values; set use_lora=false for the critic"
            )
            raise LoRAConfigError(msg)
        self.extra: dict[str, Any] = {"policy_version": 0}
        self.handed_over: int | None = None
        self.manager: CheckpointManager | None = None
        self.leased: LeasedVersions | None = None
        self._loading = False
        super().__init__(config)

    def _create_state_dict_adapter(self) -> Any:
        adapter = super()._create_state_dict_adapter()
        if self.lora_config is None or adapter is None:
            return adapter
        return GuardedNames(adapter, lambda: self._loading)

    def _setup_parallelism(self, ac_config: Any, enable_compile: bool) -> None:
        if self.lora_config is None:
            super()._setup_parallelism(ac_config, enable_compile)
            return
        from archon_lora.apply import apply_lora

        with attempt(self.cpu_group, what="applying LoRA", timeout=deadline_of(self)):
            names = hf_module_names(self.state_dict_adapter)
            apply_lora(self.model, self.lora_config, name_map=names, base_model_name=self.base_name)
        whole = self.model
        self._parallelise(ac_config, enable_compile)
        if getattr(self.parallel_dims, "pp", 1) > 1:
            from archon_lora.stages import mark_stages

            # Stages are copies of the model, cut; what an export says follows from all of it.
            mark_stages(whole, self.model_parts)
        with attempt(self.cpu_group, what="placing the adapter", timeout=deadline_of(self)):
            self._check_placed()

    def _parallelise(self, ac_config: Any, enable_compile: bool) -> None:
        """AReaL's own step; with tensor parallelism its plan learns of factors first."""
        if getattr(self.parallel_dims, "tp", 1) == 1:
            super()._setup_parallelism(ac_config, enable_compile)
            return
        from .areal_tensor_parallel import factors_in_plans

        with factors_in_plans(self.spec.parallelize_fn):
            super()._setup_parallelism(ac_config, enable_compile)

    def _check_placed(self) -> None:
        """Refuse an adapter that AReaL's layout leaves without an owner.

        Raises:
            LoRAConfigError: says what to change.
        """
        self._require_adapters()
        if getattr(self.parallel_dims, "tp", 1) > 1:
            from .areal_tensor_parallel import check_split, freeze_base

            for part in self.model_parts:
                freeze_base(part)
                check_split(part)

    def _require_adapters(self) -> None:
        """Refuse a stage for which AReaL would make an optimizer without parameters.

        Raises:
            LoRAConfigError: says what to change.
        """
        if not self._get_all_parameters():
            msg = (
                "this rank's pipeline stages hold no adapted module, and AReaL makes an optimizer "
                "for each rank: choose target_modules or pp_layers_per_stage so that every rank "
                "has some"
            )
            raise LoRAConfigError(msg)

    state_dict_adapter: Any

    def _materialize_and_load_weights(self) -> None:
        if self.lora_config is None:
            super()._materialize_and_load_weights()
            return
        from archon_lora.apply import initialise_adapters

        with self._base_loading():
            super()._materialize_and_load_weights()
        # Only now: to_empty() has just given the adapters memory with anything in it.
        for part in self.model_parts:
            initialise_adapters(part)

    @contextmanager
    def _base_loading(self) -> Iterator[None]:
        self._loading = True
        try:
            yield
        finally:
            self._loading = False

    def _get_all_parameters(self) -> list[nn.Parameter]:
        """What trains: AReaL's optimizer and gradient norm ask for it."""
        if self.lora_config is None:
            return super()._get_all_parameters()
        from archon_lora.adapter import get_adapter_params

        return [p for part in self.model_parts for p in get_adapter_params(part).values()]

    @property
    def base_name(self) -> str:
        """What ``adapter_config.json`` calls the base model: the path that AReaL was given."""
        return str(self.config.path)

    def get_version(self) -> int:
        """The policy version; a restored checkpoint brings its own."""
        return super().get_version() if self.lora_config is None else self.extra["policy_version"]

    def set_version(self, version: int) -> None:
        """Say which policy version the weights stand for."""
        super().set_version(version)
        self.extra["policy_version"] = version

    def train_state(self, **parts: Any) -> TrainState:
        """Everything that a resume needs, for a :class:`ckpt.CheckpointManager`.

        Args:
            parts: passed on to :class:`ckpt.TrainState`, e.g. ``dataloader`` or ``per_rank``.

        Raises:
            EngineNotReady: the engine is not initialised.
        """
        from archon_lora.models import base_fingerprint
        from ckpt import TrainState

        if not self.model_parts:
            msg = "the engine is not initialised: call initialize() first"
            raise EngineNotReady(msg)
        base = None
        if Path(self.base_name).is_dir():
            base = base_fingerprint(self.base_name, name=self.base_name)
        values: dict[str, Any] = {
            "optimizer": getattr(self, "optimizer", None),
            "scheduler": getattr(self, "lr_scheduler", None),
            "extra": self.extra,
            "base": base,
        }
        staged = getattr(self.parallel_dims, "pp", 1) > 1
        # A list says that other ranks hold other parts, which costs every save a question.
        model = self.model_parts if staged else self.model_parts[0]
        return TrainState(model=model, **(values | parts))

    def save(self, meta: Any) -> None:
        """AReaL's ``save``; with LoRA the adapter (``"hf"``) and the resumable state.

        Args:
            meta: AReaL's ``SaveLoadMeta``.

        Raises:
            Exception: as :func:`archon_lora.engine.checkpoint.save`.
        """
        if self.lora_config is None:
            super().save(meta)
            return
        from .checkpoint import save

        with self._offload_aware_context():
            save(cast("ArchonEngine", self), _own_meta(meta))

    def load(self, meta: Any) -> None:
        """AReaL's ``load``; with LoRA, of what :meth:`save` wrote, and of any PEFT adapter.

        Args:
            meta: AReaL's ``SaveLoadMeta``.

        Raises:
            Exception: as :func:`archon_lora.engine.checkpoint.load`.
        """
        if self.lora_config is None:
            super().load(meta)
            return
        from .checkpoint import load

        with self._offload_aware_context():
            load(cast("ArchonEngine", self), _own_meta(meta))
        super().set_version(self.get_version())

    def update_weights(self, meta: Any) -> None:
        """AReaL's ``update_weights``; with LoRA the adapter is handed over as a version.

        Args:
            meta: AReaL's ``WeightUpdateMeta``, of the type ``"disk"``.

        Raises:
            Exception: as :func:`archon_lora.engine.areal_update.hand_over`.
        """
        if self.lora_config is None:
            super().update_weights(meta)
            return
        from .areal_update import hand_over

        self._check_rollout_engine_connected()
        with self._offload_aware_context():
            hand_over(self, meta, self.hand_over or HandOver())

    def destroy(self) -> None:
        """AReaL's ``destroy``; what is still being published is finished first."""
        manager, self.manager = self.manager, None
        leased, self.leased = self.leased, None
        try:
            if leased is not None:
                leased.close()
            if manager is not None:
                manager.close()
        finally:
            super().destroy()


def _own_meta(meta: Any) -> SaveLoadMeta:
    """This project's record with the values of AReaL's."""
    from .types import SaveLoadMeta

    return SaveLoadMeta(
        path=meta.path,
        weight_format=meta.weight_format,
        with_optim=meta.with_optim,
        tokenizer=meta.tokenizer,
        processor=meta.processor,
        base_model_path=meta.base_model_path,
        naive_distributed=getattr(meta, "naive_distributed", False),
    )
