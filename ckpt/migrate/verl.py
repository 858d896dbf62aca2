"""verl's checkpoints: one file of ``torch.save`` a rank for model, optimizer and the rest.

``global_step_<N>/<role>/`` holds ``model_world_size_<W>_rank_<R>.pt`` and, unless they were left
out, ``optim_...pt`` and ``extra_state_...pt`` (schedule and random states). The optimizer goes by
number; its parameters are named by the order of the model's tensors, and every shape is compared.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.coverage import tiling_problem
from ckpt.dcp.importing import Imported
from ckpt.errors import DamagedError, NoCheckpoint, StateError
from ckpt.foreign import ForeignStep, ForeignTensor, commit_foreign
from ckpt.fqn import canonical_fqn
from ckpt.storage import open_storage
from ckpt.types import MODEL_PREFIX, OPTIM_PREFIX

from .adapter_names import adapter_export, is_adapter_name
from .torch_file import Piece, TorchFile

_FILE: Final = re.compile(r"(model|optim|extra_state)_world_size_(\d+)_rank_(\d+)\.pt")
_STEP: Final = re.compile(r"global_step_(\d+)")
_TRACKER: Final = "latest_checkpointed_iteration.txt"
_META: Final = "lora_train_meta.json"
_ROLE: Final = "actor"
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class VerlStep:
    """The files of one role.

    Attributes:
        path: its directory.
        step: the number in ``global_step_<N>``, or None if the path does not say.
        files: by kind (``model``, ``optim``, ``extra_state``), one path a rank.
    """

    path: Path
    step: int | None
    files: Mapping[str, tuple[Path, ...]]


def find_verl(directory: Path) -> VerlStep | None:
    """The checkpoint in a role's directory, or in a step's that has the role ``actor``.

    Raises:
        NoCheckpoint: files of some ranks are missing, or files of several world sizes lie there;
            or it is the run's directory, of which a step has to be named.
    """
    if (directory / _TRACKER).is_file():
        steps = sorted(p.name for p in directory.iterdir() if _STEP.fullmatch(p.name))
        msg = f"{directory} is a run of verl; name one of its steps: {', '.join(steps) or 'none'}"
        raise NoCheckpoint(msg)
    for path in (directory, directory / _ROLE):
        files = _files(path)
        if files:
            numbers = [m[1] for part in path.absolute().parts if (m := _STEP.fullmatch(part))]
            return VerlStep(path, int(numbers[-1]) if numbers else None, files)
    return None


def _files(path: Path) -> dict[str, tuple[Path, ...]]:
    if not path.is_dir():
        return {}
    found: dict[str, dict[int, Path]] = {}
    worlds: set[int] = set()
    for entry in path.iterdir():
        if match := _FILE.fullmatch(entry.name):
            found.setdefault(match[1], {})[int(match[3])] = entry
            worlds.add(int(match[2]))
    if "model" not in found:
        return {}
    if len(worlds) != 1:
        sizes = ", ".join(map(str, sorted(worlds)))
        raise NoCheckpoint(f"{path} holds files of several world sizes ({sizes}); keep one")
    world = worlds.pop()
    for kind, ranks in found.items():
        missing = [rank for rank in range(world) if rank not in ranks]
        if missing or len(ranks) != world:
            first = f"{kind}_world_size_{world}_rank_{(missing or [world])[0]}.pt"
            msg = f"{path}: {len(missing)} of {world} files of the kind {kind} are missing: {first}"
            raise NoCheckpoint(msg)
    return {kind: tuple(ranks[rank] for rank in range(world)) for kind, ranks in found.items()}


def import_verl(
    source: VerlStep,
    root: str,
    *,
    step: int | None = None,
    optimizer: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """Convert a checkpoint of verl into the first step of a run.

    Where the model has an adapter, only the adapter is taken: the frozen base is not stored. The
    tensors keep their names, so a model that is wrapped by PEFT in the same way restores it.

    Args:
        source: what :func:`find_verl` found.
        root: root of the run; it must not hold steps.
        step: number that the step gets; verl's own by default.
        optimizer: class name of the optimizer, or None to tell it from the groups.
        storage_options: for the root's store.

    Raises:
        ConfigError: the root holds steps already.
        StateError: a class, placement or value that is not read here, by name, or an optimizer
            whose parameters cannot be told.
        DamagedError: a file that does not parse, or parts that do not make up a whole.
        StorageError: a store failed.
    """
    with contextlib.ExitStack() as stack:
        files = {
            kind: [_open(stack, path) for path in paths] for kind, paths in source.files.items()
        }
        wholes = {
            canonical_fqn(name): whole for name, whole in _wholes(files["model"], None).items()
        }
        adapted = [name for name in wholes if is_adapter_name(name)]
        tied = _tied(source.path, wholes)
        kept = adapted or [name for name in wholes if name not in tied]
        skipped = [name for name in wholes if name not in set(kept)]
        tensors = {MODEL_PREFIX + name: wholes[name] for name in kept}
        section = None
        if "optim" in files:
            reader = _Optimizer(files["optim"], wholes, kept, tied)
            tensors |= reader.tensors
            section = reader.section(optimizer)
        number = source.step if step is None else step
        extra = {"global_step": number or 0}
        shared: dict[str, Any] = {"optimizer": section, "scheduler": None, "extra": extra}
        ranks: list[dict[str, Any]] = []
        for rank, file in enumerate(files.get("extra_state", ())):
            schedule, rng = _extra_state(file)
            if rank == 0:
                shared["scheduler"] = schedule
            if rng is not None:
                ranks.append({"rng": rng, "dataloader": None, "per_rank": {}})
        export = adapter_export(_lora_meta(source.path), {n: wholes[n].shape for n in adapted})
        foreign = ForeignStep(tensors, shared, ranks, export)
        manifest = commit_foreign(open_storage(root, storage_options), number or 0, foreign)
    if (source.path.parent / "data.pt").is_file():
        skipped.append("data.pt")
    return Imported(manifest, tuple(skipped), sum(map(len, source.files.values())))


def _open(stack: contextlib.ExitStack, path: Path) -> TorchFile:
    file = TorchFile(path)
    stack.callback(file.close)
    if not isinstance(file.value, dict):
        raise DamagedError(f"{path} holds a {type(file.value).__name__}, want a dictionary")
    return file


def _wholes(
    files: Sequence[TorchFile], values: Sequence[Mapping[str, Any]] | None
) -> dict[str, ForeignTensor]:
    """Every tensor of a mapping that each rank has, put together from the ranks' parts."""
    held = [file.value for file in files] if values is None else values
    names = list(held[0])
    for file, mapping in zip(files, held, strict=True):
        if list(mapping) != names:
            odd = sorted(set(mapping) ^ set(names), key=str)
            shown = ", ".join(map(str, odd[:_SHOWN])) or "another order"
            raise DamagedError(f"{file.path} and {files[0].path} differ in: {shown}")
    return {
        name: _whole(
            name, files, [f.piece(name, m[name]) for f, m in zip(files, held, strict=True)]
        )
        for name in names
    }


def _whole(name: str, files: Sequence[TorchFile], pieces: Sequence[Piece]) -> ForeignTensor:
    first = pieces[0]
    parts: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[TorchFile, Piece]] = {}
    for file, piece in zip(files, pieces, strict=True):
        if (piece.shape, piece.code) != (first.shape, first.code):
            msg = f"{file.path}: {name} is {piece.code} {piece.shape}, on rank 0 it is another"
            raise DamagedError(msg)
        if 0 not in piece.view.shape:
            # Replicas hold the same; the lowest rank's counts.
            parts.setdefault((piece.offsets, piece.view.shape), (file, piece))
    problem = tiling_problem(first.shape, list(parts)) if 0 not in first.shape else None
    if problem:
        raise DamagedError(f"{files[0].path.parent}: {name}: {problem}")
    chosen = list(parts.values())
    return ForeignTensor(first.code, first.shape, functools.partial(_assemble, first, chosen))


def _assemble(first: Piece, parts: Sequence[tuple[TorchFile, Piece]]) -> torch.Tensor:
    if len(parts) == 1 and parts[0][1].view.shape == first.shape:
        file, piece = parts[0]
        return file.tensor(piece.view)
    whole = torch.empty(first.shape, dtype=first.view.dtype)
    for file, piece in parts:
        place = zip(piece.offsets, piece.view.shape, strict=True)
        whole[tuple(slice(o, o + n) for o, n in place)] = file.tensor(piece.view)
    return whole


class _Optimizer:
    """State and groups by number, given the names of the model's parameters."""

    def __init__(
        self,
        files: Sequence[TorchFile],
        wholes: Mapping[str, ForeignTensor],
        kept: Sequence[str],
        tied: Sequence[str],
    ) -> None:
        self._files = files
        self._where = files[0].path
        states, groups = [file.value.get("state") for file in files], _groups(files[0])
        if not all(isinstance(state, dict) for state in states):
            raise DamagedError(f"{self._where}: no state of an optimizer")
        self._states: list[Mapping[Any, Mapping[str, Any]]] = states
        self._raw_groups = groups
        numbers = [n for group in groups for n in group["params"]]
        self._names = self._named(numbers, [n for n in wholes if n not in tied], wholes)
        self._kept = frozenset(kept)
        self.tensors: dict[str, ForeignTensor] = {}
        self._keys: dict[str, list[str]] = {}
        self._values: dict[str, dict[str, Any]] = {}
        for number in numbers:
            name = self._names.get(number)
            if name in self._kept:
                self._read(number, str(name), wholes)

    def _named(
        self, numbers: Sequence[Any], names: Sequence[str], wholes: Mapping[str, ForeignTensor]
    ) -> dict[Any, str]:
        """Parameter names by number: all of the model's in order, or those that have state."""
        with_state = [n for n in numbers if self._states[0].get(n)]
        trained = [name for name in names if is_adapter_name(name)] or list(names)
        for found, called in ((numbers, names), (with_state, trained), (numbers, trained)):
            if len(found) == len(called):
                pairs = dict(zip(found, called, strict=True))
                if all(self._fits(n, wholes[name].shape) for n, name in pairs.items()):
                    return pairs
        msg = (
            f"{self._where}: the optimizer numbers {len(numbers)} parameters ({len(with_state)} "
            f"with state), and the model has {len(names)} tensors ({len(trained)} trained): which "
            "is which cannot be told. Move the optim_*.pt files away to import the model alone"
        )
        raise StateError(msg)

    def _fits(self, number: Any, shape: tuple[int, ...]) -> bool:
        """Whether the moments of a parameter have its shape."""
        state = self._states[0].get(number) or {}
        pieces = [self._files[0].piece(k, v) for k, v in state.items() if k.startswith("exp_avg")]
        return all(piece.shape == shape for piece in pieces)

    def _read(self, number: Any, name: str, wholes: Mapping[str, ForeignTensor]) -> None:
        parts = [state.get(number) or {} for state in self._states]
        tensors = {k: v for k, v in parts[0].items() if not _is_plain(v)}
        found = _wholes(self._files, [{k: part[k] for k in tensors if k in part} for part in parts])
        for key, whole in found.items():
            self.tensors[f"{OPTIM_PREFIX}{name}.{key}"] = whole
            self._keys.setdefault(name, []).append(key)
        plain = {k: v for k, v in parts[0].items() if _is_plain(v)}
        if plain:
            self._values[name] = plain

    def section(self, kind: str | None) -> dict[str, Any]:
        """The section ``optimizer`` of ``state.json``."""
        groups: list[dict[str, Any]] = []
        for group in self._raw_groups:
            rest = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            plain = self._files[0].plain(rest, "param_groups")
            names = [self._names[n] for n in group["params"] if n in self._names]
            groups.append({**plain, "params": [name for name in names if name in self._kept]})
        return {
            "kind": kind or self._kind(groups),
            "groups": [group for group in groups if group["params"]],
            "values": self._values,
            "tensors": self._keys,
        }

    def _kind(self, groups: Sequence[Mapping[str, Any]]) -> str:
        keys = {key for names in self._keys.values() for key in names}
        if "exp_avg" in keys and all("decoupled_weight_decay" in group for group in groups):
            return "AdamW" if groups[0]["decoupled_weight_decay"] else "Adam"
        msg = f"{self._where} does not say which optimizer it is from; name it: --optimizer AdamW"
        raise StateError(msg)


def _groups(file: TorchFile) -> list[Mapping[str, Any]]:
    groups = file.value.get("param_groups")
    good = isinstance(groups, list) and all(
        isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
    )
    if not good:
        raise DamagedError(f"{file.path}: no groups of an optimizer")
    return list(groups)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _extra_state(file: TorchFile) -> tuple[Any, dict[str, Any] | None]:
    """The schedule, and this rank's random states in the form that a trainer saves."""
    schedule = file.plain(file.value.get("lr_scheduler"), "lr_scheduler")
    rng = file.plain(file.value.get("rng"), "rng")
    if rng is None:
        return schedule, None
    if not isinstance(rng, dict) or not {"cpu", "numpy", "random"} <= rng.keys():
        raise DamagedError(f"{file.path}: rng is not what verl saves")
    devices = [rng[name] for name in rng if name not in ("cpu", "numpy", "random")]
    cuda = [state for state in devices if isinstance(state, torch.Tensor)]
    return schedule, {
        "python": rng["random"],
        "numpy": rng["numpy"],
        "torch": rng["cpu"],
        "cuda": cuda,
    }


def _tied(path: Path, names: Mapping[str, object]) -> list[str]:
    """Output heads that are the embedding by another name: a trainer saves them once."""
    heads = [
        name for name in names if name.rpartition("lm_head.weight")[1:] == ("lm_head.weight", "")
    ]
    config = _read_json(path / "huggingface/config.json") or {}
    return heads if config.get("tie_word_embeddings") is True and len(names) > len(heads) else []


def _lora_meta(path: Path) -> Mapping[str, Any] | None:
    """Rank and alpha, which verl writes beside the files."""
    return _read_json(path / _META)


def _read_json(path: Path) -> Mapping[str, Any] | None:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamagedError(f"{path} must hold an object")
    return found
