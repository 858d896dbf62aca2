"""Does a PEFT adapter fit the live one, and which of its bytes become which live values?

The export rules say how a live tensor becomes a PEFT tensor; here they are read backwards. What
must be kept is what the model computes, ``scaling * B A`` of every module: the factor by which the
file's scaling differs from the live one goes into B, padding of the rank is taken off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from .adapter_file import AdapterFile
from .dtypes import TORCH_DTYPES
from .errors import BaseMismatch, ConfigError, StateError
from .peft import CONFIG_NAME
from .peft_config import check_export, check_plain, rank_of, scaling_of, split_key
from .types import AdapterExport, BaseIdentity, TensorRule

KeyMap = Mapping[str, str] | Callable[[str], str]
"""PEFT key in a directory to the key that the live state's export has for it."""

_SHOWN: Final = 5
_SAME: Final = 1e-6
"""Scalings nearer than this, relatively, are equal: both come from a division."""


@dataclass(frozen=True, slots=True)
class Match:
    """One PEFT tensor and the live tensor that it goes to.

    Attributes:
        rule: how the live tensor would become the PEFT tensor.
        key: the PEFT tensor in the file.
        rank_dim: the dimension that counts the rank.
        rank: the live rank; what the file has beyond it is padding.
        factor: what the file's values are multiplied by.
    """

    rule: TensorRule
    key: str
    rank_dim: int
    rank: int
    factor: float


def check_base(file: AdapterFile, base: BaseIdentity | None) -> str | None:
    """Refuse an adapter of another base model.

    A version's manifest names the base by its configuration's hash. A bare directory only has a
    name or path, of which the last component counts: the same model lies at many places.

    Returns:
        A note where nothing could be compared, else None.

    Raises:
        BaseMismatch: names both.
    """
    if base is None:
        return "the live state names no base model, so the adapter's was not compared"
    manifest = None if file.manifest is None else file.manifest.base
    if manifest is not None:
        if manifest.config_hash != base.config_hash:
            raise _other_base(file, f"{manifest.name} (config {manifest.config_hash[:12]})", base)
        return None
    name = file.config.get("base_model_name_or_path")
    if not name:
        return "the adapter names no base model, so it was not compared"
    if not isinstance(name, str) or _last(name) != _last(base.name):
        raise _other_base(file, repr(name), base)
    return None


def _other_base(file: AdapterFile, found: str, base: BaseIdentity) -> BaseMismatch:
    return BaseMismatch(
        f"the adapter in {file.storage.url} was trained over base model {found}, the live base is "
        f"{base.name!r} (config {base.config_hash[:12]}); load that base, or pass any_base=True if "
        "it is the same model under another name"
    )


def _last(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def fit(
    file: AdapterFile,
    export: AdapterExport,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    keymap: KeyMap | None = None,
    rescale: bool = False,
    elsewhere: Collection[str] = (),
) -> list[Match]:
    """Pair every PEFT tensor with the live tensor it goes to.

    Args:
        file: the adapter.
        export: the live state's.
        shapes: global shape of every live floating-point tensor, by canonical FQN.
        keymap: renames the file's keys before they are compared.
        rescale: take an adapter whose scaling is neither the live one nor the one that an export
            of the live state has, and fold the difference into B.
        elsewhere: names of live tensors that only other ranks hold; theirs are not paired here.

    Raises:
        ConfigError: the configuration or the export cannot work, or it is no plain LoRA.
        StateError: lists what is missing, unexpected, of another shape, rank or scaling.
    """
    where = f"{file.storage.url}/{CONFIG_NAME}"
    check_export(export)
    check_plain(file.config, where)
    named = _renamed(file, keymap)
    rules = {rule.key: rule for rule in export.rules}
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (
            ("the directory lacks", sorted(rules.keys() - named.keys())),
            ("the live state lacks", sorted(named.keys() - rules.keys())),
            ("no export rule covers", _uncovered(export, shapes)),
        )
        if keys
    ]
    matches: list[Match] = []
    wrong: list[str] = []
    scales = {rule.key: rule.scale for rule in export.rules}
    for key in sorted(rules.keys() & named.keys()):
        if rules[key].source in elsewhere:
            continue
        found = _match(file, named[key], rules[key], shapes, export, scales, rescale=rescale)
        if isinstance(found, str):
            wrong.append(found)
        else:
            matches.append(found)
    problems += wrong[:_SHOWN] + ([f"and {len(wrong) - _SHOWN} more"] if wrong[_SHOWN:] else [])
    if problems:
        msg = (
            f"the adapter in {file.storage.url} does not fit the live one: {'; '.join(problems)}. "
            "Nothing was changed"
        )
        raise StateError(msg)
    return matches


def _renamed(file: AdapterFile, keymap: KeyMap | None) -> dict[str, str]:
    """The file's keys by the names they are compared under."""
    if keymap is None:
        return {key: key for key in file.tensors}
    named: dict[str, str] = {}
    for key in file.tensors:
        try:
            new = keymap(key) if callable(keymap) else keymap.get(key, key)
        except Exception as error:
            msg = f"keymap failed for {key!r}: {type(error).__name__}: {error}"
            raise ConfigError(msg) from error
        if not isinstance(new, str) or new in named:
            msg = f"keymap makes {new!r} of {key!r}" + (
                f" and of {named[new]!r}" if new in named else "; want a key"
            )
            raise ConfigError(msg)
        named[new] = key
    return named


def _uncovered(export: AdapterExport, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Live tensors, or slices of them, that no PEFT tensor would give a value."""
    used: dict[str, set[int | None]] = {}
    for rule in export.rules:
        used.setdefault(rule.source, set()).add(rule.index)
    lost = [name for name in shapes if name not in used and name not in export.others]
    for name, indices in used.items():
        if None not in indices and name in shapes:
            lost += [f"{name}[{i}]" for i in range(shapes[name][0]) if i not in indices]
    return sorted(lost)


def _match(
    file: AdapterFile,
    key: str,
    rule: TensorRule,
    shapes: Mapping[str, tuple[int, ...]],
    export: AdapterExport,
    scales: Mapping[str, float],
    *,
    rescale: bool,
) -> Match | str:
    """The pair, or why it is none."""
    live = shapes.get(rule.source)
    if live is None:
        return f"the export rule of {rule.key} names {rule.source}, which does not train"
    if rule.index is not None:
        if not 0 <= rule.index < live[0]:
            return f"the export rule of {rule.key} takes slice {rule.index} of {live[0]}"
        live = live[1:]
    entry = file.tensors[key]
    module, side = split_key(rule.key)
    try:
        there = split_key(key)[0]
    except ConfigError as error:
        return str(error)
    dim = 0 if side == "A" else 1
    if not TORCH_DTYPES[entry.dtype].is_floating_point:
        return f"{key} has dtype {entry.dtype}, want floating point"
    rank = rank_of(file.config, there)
    wanted = (*live[:dim], rank, *live[dim + 1 :])
    if entry.shape != wanted:
        return (
            f"{key} has shape {list(entry.shape)}, but rank {rank} (by its configuration) and the "
            f"live {rule.source} want {list(wanted)}"
        )
    if rank < live[dim]:
        return f"{key} has rank {rank}, the live adapter {live[dim]}; build it with rank {rank}"
    own = scaling_of(file.config, there)
    plain = scaling_of(export.peft_config, module)
    pair = {"A": "B", "B": "A"}[side]
    tail = side + (".weight" if rule.key.endswith(".weight") else "")  # embeddings have none
    other = scales[rule.key.removesuffix(tail) + tail.replace(side, pair)]
    scaling = plain * rule.scale * other
    if not rescale and not any(math.isclose(own, s, rel_tol=_SAME) for s in (plain, scaling)):
        return (
            f"{key} is scaled by {own:g} (alpha / r), the live adapter by {scaling:g}; set the "
            "same alpha, or pass rescale=True to fold the difference into B"
        )
    # delta = own * B_file A_file = scaling * B A, with A = A_file / scale of A's rule.
    factor = 1.0 / rule.scale if side == "A" else own * other / scaling
    return Match(rule, key, dim, live[dim], factor)


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
