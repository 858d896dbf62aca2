"""All rules over one adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.errors import ConfigError, ObjectNotFound
from ckpt.layout import check_name
from ckpt.peft import CONFIG_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, local_directory
from ckpt.storage import open_storage
from ckpt.storage.base import Storage

from .base import BaseModel
from .codes import RULES
from .config_rules import config_findings
from .finding import ENGINES, Engine, Finding, Severity, findings
from .reading import ADDED_TOKENS, PT_NAME, AdapterFiles, read_files, values
from .subject import LintLimits, Subject, TensorForm
from .tensor_rules import tensor_findings

MOVING: Final = re.compile(
    r"(.*[-_.])?(latest|newest|current|last|best|live|stable|prod|production|staging)",
    re.IGNORECASE,
)
"""Names that stand for another adapter tomorrow."""

_ORDER: Final = {code: number for number, code in enumerate(RULES)}


def lint_adapter(
    url: str | Path,
    *,
    engines: Collection[Engine] = ENGINES,
    limits: LintLimits | None = None,
    base: BaseModel | None = None,
    read_values: bool = True,
    storage_options: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """What engines would refuse, take wrongly or die of in a PEFT adapter directory.

    Args:
        url: the directory, local or remote.
        engines: whose findings are wanted.
        limits: how the engines are started; by default as they start by themselves.
        base: the base model, for rules on layers, names and sizes.
        read_values: look at every value, for NaN; without, only the heads of files are read.
        storage_options: for a remote directory's store.

    Returns:
        Findings, errors first; none if every engine computes what was trained.

    Raises:
        ConfigError: an unknown engine, or an unusable URL.
        ObjectNotFound: nothing is there.
        NoCheckpoint: a run's root was given.
        StorageError: the store failed.
    """
    unknown = sorted(set(engines) - set(ENGINES))
    if unknown:
        raise ConfigError(f"engines are {', '.join(ENGINES)}; got {unknown[0]!r}")
    local = local_directory(url)
    if local is not None and not local.is_dir():
        raise ObjectNotFound(f"no such directory: {local}")
    storage = open_storage(str(url), storage_options)
    name = (str(local) if local is not None else str(url)).rstrip("/").rpartition("/")[2]
    found = read_files(storage, name)
    every = [*_file_findings(found, base)]
    if found.config is not None and found.tensors is not None:
        subject = Subject(found.config, found.tensors, base, limits or LintLimits())
        every += _subject_findings(subject)
    if read_values:
        every += _value_findings(storage, found)
    return _sorted(finding for finding in every if finding.engine in engines)


def lint_export(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorForm],
    *,
    limits: LintLimits | None = None,
    base: BaseModel | None = None,
) -> list[Finding]:
    """The rules that need no file: for an adapter that is about to be written.

    Args:
        config: what ``adapter_config.json`` will hold.
        tensors: dtype and shape of every tensor by its PEFT key.
        limits: as in :func:`lint_adapter`.
        base: as in :func:`lint_adapter`.
    """
    return _sorted(_subject_findings(Subject(config, tensors, base, limits or LintLimits())))


def _subject_findings(subject: Subject) -> list[Finding]:
    return [*config_findings(subject), *tensor_findings(subject)]


def _sorted(every: Iterable[Finding]) -> list[Finding]:
    def place(finding: Finding) -> tuple[bool, int, int]:
        warning = finding.severity is Severity.warning
        return warning, _ORDER[finding.code], ENGINES.index(finding.engine)

    return sorted(every, key=place)


def _file_findings(found: AdapterFiles, base: BaseModel | None) -> Iterator[Finding]:
    files = found.files
    if CONFIG_NAME not in files.names:
        yield from findings(RULES["config-missing"], [CONFIG_NAME], f"{CONFIG_NAME} is not there")
    elif found.config_problem is not None:
        yield from findings(RULES["config-invalid"], [CONFIG_NAME], found.config_problem)
    if found.weights_problem is not None:
        where = files.weights or WEIGHTS_NAME
        yield from findings(RULES["weights-damaged"], [where], found.weights_problem)
    yield from _weights_findings(found)
    tokens = files.added_tokens or {}
    vocab = None if base is None else base.vocab
    beyond = [
        token
        for token, number in tokens.items()
        if isinstance(number, int) and (vocab is None or number >= vocab)
    ]
    detail = f"{ADDED_TOKENS} has {beyond[0]!r} as {tokens[beyond[0]]}" if beyond else ""
    yield from findings(RULES["added-tokens"], beyond, detail, certain=vocab is not None)
    if MOVING.fullmatch(files.name):
        detail = f"the directory is called {files.name!r}"
        yield from findings(RULES["name-moving"], [files.name], detail, certain=False)
    try:
        check_name("directory name", files.name)
    except ConfigError:
        detail = f"the directory is called {files.name!r}"
        yield from findings(RULES["name-unsafe"], [files.name], detail)


def _weights_findings(found: AdapterFiles) -> Iterator[Finding]:
    names, weights = found.files.names, found.files.weights
    safetensors = [name for name in names if name.endswith(".safetensors")]
    pickled = [name for name in names if name.endswith((".bin", ".pt"))]
    if weights is None:
        detail = f"no {WEIGHTS_NAME}" + (f", but {pickled[0]}" if pickled else "")
        yield from findings(RULES["weights-missing"], [WEIGHTS_NAME], detail)
        return
    detail = f"the weights are in {weights}"
    if weights not in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME, PT_NAME):
        yield from findings(RULES["weights-name"], safetensors, detail)
        return
    if weights in (LEGACY_WEIGHTS_NAME, PT_NAME):
        yield from findings(RULES["weights-pickle"], [weights], detail)
    if weights == PT_NAME:
        yield from findings(RULES["weights-pt"], [weights], detail)
    foreign = [name for name in safetensors if name != weights]
    also = f"{foreign[0]} is there as well" if foreign else ""
    yield from findings(RULES["foreign-safetensors"], foreign, also)
    foreign = [name for name in pickled if name != weights]
    also = f"{foreign[0]} is there as well" if foreign else ""
    yield from findings(RULES["foreign-weights"], foreign, also)


def _value_findings(storage: Storage, found: AdapterFiles) -> Iterator[Finding]:
    bad: dict[str, None] = {}
    zero = {"A": True, "B": True}
    seen = set()
    for key, piece in values(storage, found):
        if piece.element_size() == 1:  # 8-bit floats have no aminmax
            piece = piece.float()
        low, high = torch.aminmax(piece)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            bad[key] = None
        for side in zero:
            if re.search(rf"\.lora_(embedding_)?{side}\b", key):
                seen.add(side)
                zero[side] = zero[side] and not bool(low) and not bool(high)
    wheres = list(bad)
    detail = f"{wheres[0]!r} holds NaN or infinity" if wheres else ""
    yield from findings(RULES["non-finite"], wheres, detail)
    nothing = [side for side in sorted(seen) if zero[side]]
    detail = f"every lora_{nothing[0]} is zero" if nothing else ""
    yield from findings(RULES["no-effect"], [f"lora_{side}" for side in nothing], detail)
