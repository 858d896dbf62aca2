"""Whether a replica serves a version: shown by its own answers, not by its word.

An engine that says it loaded an adapter may serve the base model, half of the adapter or another
one. So it is asked for the log-probabilities of a prompt, under the adapter and without it, and the
two answers are held against what the trainer recorded. Where it recorded nothing, the answers have
to differ, and the files that the engine was given have to be the published ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from ckpt.errors import DamagedError
from ckpt.layout import MANIFEST
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ckpt.peft_config import split_key

from .engine import Engine, ProofError
from .probe import Probe, distance
from .registry import Version

DEFAULT_PROMPT: Final = tuple(range(1, 17))
"""Token ids that any vocabulary has, for versions without a probe."""

NOISE_FLOOR: Final = 1e-6
"""Nats; answers closer than this are one answer."""

Told: TypeAlias = Literal["expected", "difference", "no effect"]

_OTHER_WEIGHTS: Final = (".safetensors", ".bin", ".pt")
_READ_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the answers showed; all numbers are a :func:`~ckpt.handoff.probe.distance`, in nats.

    Attributes:
        by: ``expected``: they are the ones that the trainer recorded; ``difference``: nothing was
            recorded, they are not the base's and the files have the published digest; ``no
            effect``: nothing was recorded, and the adapter is one that changes nothing.
        moved: how far the answer under the adapter is from the base's.
        off: how far it is from the recorded one, or None.
        noise: how far two answers of the base were apart.
        telling: whether the base's answer would have been told from the version's.
    """

    by: Told
    moved: float
    off: float | None
    noise: float
    telling: bool


def check_directory(version: Version, directory: Path, *, digest: bool) -> None:
    """Refuse a directory that is not exactly the version's.

    Args:
        version: whose it should be.
        directory: what an engine is going to be given.
        digest: compare the weights' SHA-256 too, which reads the whole file.

    Raises:
        DamagedError: another name, a file that is missing, has another size or digest, or one
            that an engine would load as well.
    """
    if directory.name != version.name:
        msg = (
            f"{directory} must be called {version.name}: engines keep what they know by path, so "
            "each version has one of its own"
        )
        raise DamagedError(msg)
    sizes = {file.name: file.size for file in version.files}
    try:
        present = {item.name: item.stat().st_size for item in directory.iterdir()}
    except OSError as error:
        msg = f"{directory} cannot be read ({error.strerror}); fetch the version again"
        raise DamagedError(msg) from None
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if present.get(name) != sizes.get(name):
            found = "no such file" if name not in present else f"{present[name]} bytes"
            msg = (
                f"{directory}/{name}: {found}, the manifest says {sizes.get(name)}; fetch it again"
            )
            raise DamagedError(msg)
    for name in sorted(present.keys() - {CONFIG_NAME, WEIGHTS_NAME, MANIFEST}):
        if name.endswith(_OTHER_WEIGHTS):
            msg = f"{directory}/{name} is foreign, and engines would load it; remove it"
            raise DamagedError(msg)
    if digest and _sha256(directory / WEIGHTS_NAME) != version.adapter_sha256:
        msg = f"{directory}/{WEIGHTS_NAME} is not what was published as {version.name}"
        raise DamagedError(f"{msg} (another SHA-256); fetch it again")


def prove(engine: Engine, version: Version, directory: Path) -> Evidence:
    """Show from a replica's answers that it serves a version.

    Args:
        engine: the replica; it was told to load the version from ``directory``.
        version: what it should serve.
        directory: the version's files, already checked by :func:`check_directory`.

    Raises:
        ProofError: the answers do not show it; says what they show instead.
        DamagedError: nothing was recorded, and the files cannot be read.
        EngineUnreachable: no answer, perhaps since the adapter ended the replica.
        EngineError: an answer that is no success.
    """
    probe = version.probe
    listed = engine.adapters()
    if version.name not in listed:
        raise ProofError(engine.url, version.name, "it is not on the replica's list of models")
    path = listed[version.name]
    if path is not None and path != str(directory):
        reason = f"the name stands for {path} there, not for {directory}"
        raise ProofError(engine.url, version.name, reason)
    prompt = DEFAULT_PROMPT if probe is None else probe.token_ids
    before = engine.logprobs(prompt, None)
    answer = engine.logprobs(prompt, version.name)
    # Asked again after it: an adapter with NaN spoils what the base answers, too.
    after = engine.logprobs(prompt, None)
    for what, values in (("its answer", answer), ("the base's answer after it", after)):
        if not all(map(math.isfinite, values)):
            raise ProofError(engine.url, version.name, f"{what} is not finite")
    noise = distance(before, after)
    moved = distance(answer, before)
    same = moved <= max(2 * noise, NOISE_FLOOR)
    if probe is None:
        return _by_difference(engine, version, directory, moved, noise, same=same)
    off = distance(answer, probe.logprobs)
    if probe.base_logprobs is not None:
        base_off = distance(before, probe.base_logprobs)
        if base_off > probe.tolerance:
            reason = (
                f"even without the adapter it answers {base_off:.3g} nats off what was recorded "
                f"(tolerance {probe.tolerance:g}): it serves another base model"
            )
            raise ProofError(engine.url, version.name, reason)
    if off > probe.tolerance:
        raise ProofError(engine.url, version.name, _what_it_is(probe, answer, off, same=same))
    recorded = probe.effect
    effect = distance(probe.logprobs, before) if recorded is None else recorded
    telling = effect > probe.tolerance
    if same and (telling or recorded is None):
        reason = f"it serves the base model under this name (answers within {moved:.3g} nats)"
        raise ProofError(engine.url, version.name, reason)
    return Evidence("expected", moved, off, noise, telling)


def _by_difference(
    engine: Engine, version: Version, directory: Path, moved: float, noise: float, *, same: bool
) -> Evidence:
    if not same:
        return Evidence("difference", moved, None, noise, telling=True)
    if _has_effect(directory):
        reason = (
            f"it serves the base model under this name (answers within {moved:.3g} nats, and the "
            "adapter is not zero); run `ckpt lint` on it"
        )
        raise ProofError(engine.url, version.name, reason)
    return Evidence("no effect", moved, None, noise, telling=False)


def _what_it_is(probe: Probe, answer: Sequence[float], off: float, *, same: bool) -> str:
    """Which wrong answer it is."""
    if same:
        return "it serves the base model under this name"
    worst = max(range(len(answer)), key=lambda i: abs(answer[i] - probe.logprobs[i]))
    return (
        f"it serves something else: its answer is {off:.3g} nats off what was recorded, tolerance "
        f"{probe.tolerance:g} (token {worst + 1}: {answer[worst]:.4f}, not "
        f"{probe.logprobs[worst]:.4f})"
    )


def _has_effect(directory: Path) -> bool:
    """Whether the adapter changes anything: a fresh one, of whose A and B one is zero, does not."""
    _, tensors = read_adapter(directory)
    felt: dict[str, list[bool]] = {}
    for key, tensor in tensors.items():
        module, _ = split_key(key)
        felt.setdefault(module, []).append(bool(tensor.count_nonzero()))
    return any(map(all, felt.values()))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
