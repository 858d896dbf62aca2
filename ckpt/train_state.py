"""What a run consists of, by name: the seam between a trainer and its checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .errors import ConfigError, NotExportable, StateError
from .fqn import TrainableWalk
from .optim import (
    apply_optimizer,
    group_problem,
    innermost,
    optimizer_tensors,
    optimizer_values,
    parameter_names,
    take_scheduled_rates,
)
from .peft_model import export_of_peft, find_peft_model
from .rng import apply_rng, capture_rng, derive_rng
from .stages import join_optimizers, join_schedules
from .state import encode_state
from .state_parts import ALL_PARTS, Part
from .types import EXPERT_FORMS, MODEL_PREFIX, AdapterExport, BaseIdentity, TensorRule

logger = logging.getLogger(__name__)


NOTHING_TRAINS = (
    "the model has no parameter that requires a gradient, so there is nothing to save; apply the "
    "adapter (or unfreeze the model) before TrainState is used"
)


@runtime_checkable
class Stateful(Protocol):
    """Anything that can describe its state in JSON-like values and take it back."""

    def state_dict(self) -> Any:
        """The state, in values that :func:`ckpt.state.encode_state` knows."""
        ...

    def load_state_dict(self, state: Any, /) -> Any:
        """Continue from a state that :meth:`state_dict` returned."""
        ...


@dataclass(frozen=True, slots=True)
class LiveTensors:
    """The tensors of one moment, as objects (nothing is copied).

    Attributes:
        tensors: checkpoint name to tensor or DTensor.
        optimizer_params: canonical FQN to parameter, for all the optimizers hold.
        owners: canonical FQN to the optimizer that holds the parameter.
    """

    tensors: dict[str, torch.Tensor]
    optimizer_params: dict[str, torch.Tensor]
    owners: dict[str, torch.optim.Optimizer]

    def of(self, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """The parameters of one optimizer, by canonical FQN."""
        return {n: p for n, p in self.optimizer_params.items() if self.owners[n] is optimizer}

    @property
    def trains(self) -> bool:
        """Whether any parameter requires a gradient."""
        return any(tensor.requires_grad for tensor in self.tensors.values())


class TrainState:
    """A model's trainable part, its optimizer, and everything else that an exact resume needs.

    Saved are the parameters that require a gradient, every adapter's, the persistent buffers of
    what trains, the optimizer state of these, the scheduler, ``extra``, and *per rank*: the random
    number generators, the data position and ``per_rank``. A frozen base is named by ``base`` only.

    A list of models says that they are this rank's stages of a pipeline, and that other ranks may
    hold others: names may differ between ranks then. What each rank holds must fit the rest, and
    together the ranks must hold all of it. A rank may hold nothing that trains, or no model.

    Args:
        model: the (sharded, wrapped or plain) model, or a list of this rank's pipeline stages.
        optimizer: built over the model's parameters, or None; or a list, one for each stage. A
            wrapper that keeps the real one as ``.optimizer`` (Accelerate's) will do.
        scheduler: an LR scheduler, or None; or a list, of which all must be in the same state.
        dataloader: gives this rank's data position, or None.
        extra: JSON-like values that are equal on all ranks, such as ``policy_version``. The dict
            is updated in place by a restore.
        per_rank: objects whose state differs from rank to rank, by name.
        export: how the PEFT adapter is made. By default ``model.adapter_export()`` is asked, and
            of a model that PEFT wrapped it is :func:`ckpt.peft_model.export_of_peft`.
        base: which frozen base the adapter belongs to; a restore over another one is refused.

    Attributes:
        parted: whether other ranks may hold other parts of the model.

    Raises:
        ConfigError: an argument that lacks what is needed of it.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        scheduler: Stateful | Sequence[Stateful] | None = None,
        dataloader: Stateful | None = None,
        extra: dict[str, Any] | None = None,
        *,
        per_rank: Mapping[str, Stateful] | None = None,
        export: AdapterExport | Mapping[str, Any] | None = None,
        base: BaseIdentity | Mapping[str, Any] | None = None,
    ) -> None:
        self.parted = not isinstance(model, nn.Module)
        self.models: tuple[nn.Module, ...] = (
            (model,) if isinstance(model, nn.Module) else tuple(model)
        )
        self._walks = tuple(map(TrainableWalk, self.models))
        self.optimizers = tuple(innermost(each) for each in _several(optimizer))
        self.schedulers: tuple[Stateful, ...] = _several(scheduler)
        self.dataloader = dataloader
        self.extra: dict[str, Any] = {} if extra is None else _mutable("extra", extra)
        self.per_rank: dict[str, Stateful] = dict(per_rank or {})
        self._export = export
        self._told = False
        self.base = None if base is None else BaseIdentity.of(base)
        stateful: dict[str, Any] = {"scheduler": scheduler, "dataloader": dataloader}
        if isinstance(scheduler, list | tuple):
            del stateful["scheduler"]
            stateful |= {f"scheduler[{i}]": item for i, item in enumerate(scheduler)}
        stateful |= {f"per_rank[{name!r}]": value for name, value in self.per_rank.items()}
        for name, value in stateful.items():
            if value is not None and not isinstance(value, Stateful):
                msg = (
                    f"{name} must have state_dict() and load_state_dict(), got "
                    f"{type(value).__name__}"
                )
                raise ConfigError(msg)

    @property
    def policy_version(self) -> int | None:
        """``extra["policy_version"]`` if it is an integer."""
        value = self.extra.get("policy_version")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def export(self) -> AdapterExport | None:
        """How the PEFT adapter is made from the saved tensors, or None.

        Raises:
            ConfigError: the given or the model's own export is malformed.
            NotExportable: PEFT's active adapter is more than plain LoRA.
        """
        if self._export is not None:
            return export_of(self._export)
        for model in self.models:
            inner: Any = getattr(model, "module", model)
            maker: Callable[[], Mapping[str, Any]] | None = getattr(
                model, "adapter_export", getattr(inner, "adapter_export", None)
            )
            if maker is not None:
                return export_of(maker())
        # A model that PEFT wrapped has no such call; which of its adapters is active, it knows.
        wrapped = [model for model in self.models if find_peft_model(model) is not None]
        return export_of_peft(wrapped[0]) if wrapped else None

    def export_if_any(self) -> AdapterExport | None:
        """As :meth:`export`, and None for an adapter that can be resumed and not exported.

        Raises:
            ConfigError: the given or the model's own export is malformed.
        """
        try:
            return self.export()
        except NotExportable as error:
            if not self._told:
                logger.warning("steps are saved, but cannot be exported: %s", error)
            self._told = True
            return None

    def live(self) -> LiveTensors:
        """Walk the models and the optimizers; cheap enough for every save.

        Raises:
            StateError: nothing trains (unless the state is parted), a name occurs twice, a tensor
                is on the meta device, a parameter has two optimizers, or an optimizer holds one
                that is not the models'.
        """
        tensors: dict[str, torch.Tensor] = {}
        names: dict[int, str] = {}
        for walk in self._walks:
            named, found = walk()
            names |= named
            for name, tensor in found:
                _add(tensors, name, tensor)
        live = LiveTensors(tensors, {}, {})
        if not live.trains and not self.parted:
            raise StateError(NOTHING_TRAINS)
        for optimizer in self.optimizers:
            params = parameter_names(optimizer, names)
            twice = [name for name in params if name in live.owners]
            if twice:
                msg = f"two optimizers hold {twice[0]}; a parameter has one optimizer"
                raise StateError(msg)
            live.optimizer_params.update(params)
            live.owners.update(dict.fromkeys(params, optimizer))
            tensors |= optimizer_tensors(optimizer, params)
        return live

    def shared_values(self, live: LiveTensors) -> dict[str, Any]:
        """What is equal on all ranks and is no tensor of the shards, by section.

        Of a parted state, ``optimizer`` covers this rank's parameters, and a rank without any may
        have neither optimizer nor schedule; :mod:`ckpt.stages` makes the whole.

        Raises:
            StateError: several optimizers or schedules that do not go together.
        """
        optimizers = [optimizer_values(o, live.of(o)) for o in self.optimizers]
        return {
            "optimizer": optimizers[0] if len(optimizers) == 1 else join_optimizers(optimizers),
            "scheduler": join_schedules([item.state_dict() for item in self.schedulers]),
            "extra": self.extra,
        }

    def rank_values(self) -> dict[str, Any]:
        """What belongs to this rank alone."""
        return {
            "rng": capture_rng(),
            "dataloader": None if self.dataloader is None else self.dataloader.state_dict(),
            "per_rank": {name: item.state_dict() for name, item in self.per_rank.items()},
        }

    def problems(
        self,
        shared: Mapping[str, Any],
        ranks: Sequence[Mapping[str, Any]],
        parts: frozenset[Part] = ALL_PARTS,
    ) -> list[str]:
        """What of the saved values has no live counterpart, or the other way round.

        Args:
            shared: what :meth:`shared_values` gave.
            ranks: what :meth:`rank_values` gave on every rank that saved.
            parts: the parts that are looked at.

        Raises:
            StateError: hyperparameters that cannot be given to the live optimizer's groups.
        """
        found = []
        live = self.live()
        pairs: list[tuple[Part, str, Any, Any]] = []
        if live.trains or self.optimizers or self.schedulers:
            # A stage without an adapter needs none of the two.
            pairs += [
                (Part.OPTIMIZER, "optimizer", shared["optimizer"], self.optimizers or None),
                (Part.SCHEDULER, "scheduler", shared["scheduler"], self.schedulers or None),
            ]
        pairs.append((Part.DATALOADER, "dataloader", ranks[0]["dataloader"], self.dataloader))
        for name in sorted({*ranks[0]["per_rank"], *self.per_rank}):
            saved, mine = ranks[0]["per_rank"].get(name), self.per_rank.get(name)
            pairs.append((Part.PER_RANK, f"per_rank[{name!r}]", saved, mine))
        for part, name, saved, mine in pairs:
            if part in parts and (saved is None) != (mine is None):
                where = "the checkpoint" if mine is None else "the live state"
                found.append(f"only {where} has {name}")
        if shared["optimizer"] is not None and Part.OPTIMIZER in parts:
            for optimizer in self.optimizers:
                reason = group_problem(optimizer, live.of(optimizer), shared["optimizer"])
                if reason:
                    raise StateError(reason)
        return found

    def apply_values(
        self,
        shared: Mapping[str, Any],
        ranks: Sequence[Mapping[str, Any]],
        optimizer_state: Mapping[str, Mapping[str, torch.Tensor]],
        rank: int,
        world: int,
        parts: frozenset[Part] = ALL_PARTS,
    ) -> list[str]:
        """Give every live object its saved values.

        Args:
            shared: what :meth:`shared_values` gave.
            ranks: what :meth:`rank_values` gave on every rank that saved.
            optimizer_state: FQN, then key, to the tensor that holds the saved value.
            rank: this rank.
            world: number of ranks now.
            parts: the parts that are given; the others stay as they are.

        Returns:
            What could not carry over exactly, for the log.
        """
        notes = []
        optimizers = self.optimizers if Part.OPTIMIZER in parts else ()
        if optimizers and shared["optimizer"] is not None:
            live = self.live()
            for optimizer in optimizers:
                params = live.of(optimizer)
                apply_optimizer(optimizer, params, shared["optimizer"], optimizer_state)
        if Part.SCHEDULER in parts and shared["scheduler"] is not None:
            for schedule in self.schedulers:
                schedule.load_state_dict(shared["scheduler"])
                for optimizer in () if optimizers else self.optimizers:
                    notes += take_scheduled_rates(optimizer, schedule)
        if Part.EXTRA in parts:
            self.extra.clear()
            self.extra.update(shared["extra"])
        return notes + self._apply_rank(ranks, rank, world, parts)

    def _apply_rank(
        self, ranks: Sequence[Mapping[str, Any]], rank: int, world: int, parts: frozenset[Part]
    ) -> list[str]:
        notes = []
        same = len(ranks) == world
        mine = ranks[rank % len(ranks)]
        stateful: dict[str, tuple[Stateful, list[Any]]] = {}
        if self.dataloader is not None and Part.DATALOADER in parts:
            stateful["dataloader"] = (self.dataloader, [entry["dataloader"] for entry in ranks])
        for name, item in self.per_rank.items() if Part.PER_RANK in parts else ():
            stateful[f"per_rank[{name!r}]"] = (item, [e["per_rank"].get(name) for e in ranks])
        for name, (item, saved) in stateful.items():
            value = saved[rank % len(ranks)]
            if value is None:
                continue
            item.load_state_dict(value)
            if not same and any(encode_state(e) != encode_state(saved[0]) for e in saved[1:]):
                notes.append(
                    f"{name}: saved on {len(ranks)} ranks with different states, now {world}; "
                    f"rank {rank} continues from that of rank {rank % len(ranks)}"
                )
        if Part.RNG not in parts:
            return notes
        # Last, because the objects above may draw numbers while they load.
        if same:
            notes += apply_rng(mine["rng"])
        else:
            derive_rng(ranks[0]["rng"], rank, world)
            notes.append(
                f"random number generators: saved on {len(ranks)} ranks, now {world}; rank {rank} "
                "continues from a seed derived from the checkpoint"
            )
        return notes


def _several(value: Any) -> tuple[Any, ...]:
    """One, several or none, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _add(tensors: dict[str, torch.Tensor], name: str, tensor: torch.Tensor) -> None:
    key = MODEL_PREFIX + name
    if key in tensors:
        msg = f"two tensors of the model are called {name!r} once wrappers are taken off"
        raise StateError(msg)
    if tensor.is_meta:
        msg = f"{name} is on the meta device; materialise and load the model first"
        raise StateError(msg)
    tensors[key] = tensor


def _mutable(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        msg = f"{name} must be a dict (a restore updates it in place), got {type(value).__name__}"
        raise ConfigError(msg)
    return value


def export_of(export: AdapterExport | Mapping[str, Any]) -> AdapterExport:
    """An export as a record, whichever way it was given.

    Raises:
        ConfigError: a mapping without the fields that are needed.
    """
    if isinstance(export, AdapterExport):
        return export
    try:
        rules = tuple(TensorRule(**rule) for rule in export["rules"])
        others = tuple(export.get("others", ()))
        form = export.get("experts", "single")
        if form not in EXPERT_FORMS:
            msg = f"the export's experts must be one of {', '.join(EXPERT_FORMS)}, got {form!r}"
            raise ConfigError(msg)
        return AdapterExport(dict(export["peft_config"]), rules, others, form)
    except (KeyError, TypeError) as error:
        msg = f"the adapter export needs 'peft_config' and 'rules' of TensorRule fields: {error}"
        raise ConfigError(msg) from error
