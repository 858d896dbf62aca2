"""From a model name in somebody's request to the directory of a verified version.

Only a name of the form ``<run>-v<8 digits>`` of a configured run leads anywhere, and what leads
there is the run and the number that were parsed from it, never the text itself. Moving names are
refused: an engine keeps an adapter by its name, so that ``latest`` would go on being served after
a newer version exists.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import BaseMismatch, ConfigError, DamagedError, NoCheckpoint
from ckpt.layout import MAX_NAME, check_run_name, parse_version_name, version_name

from .base_model import check_base, config_hash
from .cache import VersionCache
from .registry import Registry
from .sizes import parse_size

ROOTS: Final = "CKPT_VLLM_ROOTS"
CACHE: Final = "CKPT_VLLM_CACHE"
CACHE_BYTES: Final = "CKPT_VLLM_CACHE_BYTES"
TIMEOUT: Final = "CKPT_VLLM_TIMEOUT"
BASE_HASH: Final = "CKPT_VLLM_BASE_HASH"
DEFAULT_CACHE_BYTES: Final = "64GiB"
DEFAULT_TIMEOUT_S: Final = 120.0

_SHORT: Final = re.compile(r"-v([0-9]{1,20})")
_MOVING: Final = frozenset({"", "-latest", "/latest", ":latest", "@latest"})
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

log = logging.getLogger(__name__)


class Refused(Exception):
    """A name that will not be resolved, and why."""


@dataclass(frozen=True, slots=True)
class ResolverSettings:
    """What the environment of an inference server configures.

    Attributes:
        roots: URL of the root by the run's name.
        cache: directory of the cache.
        cache_bytes: bound on its size.
        timeout_s: seconds that a request waits for its adapter.
        base_hash: config hash of the served model, where its directory does not tell.
    """

    roots: Mapping[str, str]
    cache: Path
    cache_bytes: int
    timeout_s: float = DEFAULT_TIMEOUT_S
    base_hash: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> ResolverSettings | None:
        """The settings, or None if ``CKPT_VLLM_ROOTS`` is not set.

        Raises:
            ConfigError: a variable that cannot be; names it.
        """
        if not environment.get(ROOTS, "").strip():
            return None
        cache = environment.get(CACHE, "")
        if not cache or not Path(cache).is_absolute():
            msg = f"{CACHE} must be the absolute path of a directory for adapters, got {cache!r}"
            raise ConfigError(msg)
        base_hash = environment.get(BASE_HASH) or None
        if base_hash is not None and not _SHA256.fullmatch(base_hash):
            msg = f"{BASE_HASH} must be 64 hexadecimal digits, got {base_hash!r}"
            raise ConfigError(msg)
        return cls(
            roots=parse_roots(environment[ROOTS]),
            cache=Path(cache),
            cache_bytes=parse_size(CACHE_BYTES, environment.get(CACHE_BYTES, DEFAULT_CACHE_BYTES)),
            timeout_s=_seconds(environment.get(TIMEOUT)),
            base_hash=base_hash,
        )


def parse_roots(text: str) -> dict[str, str]:
    """``run=URL`` pairs, separated by white space.

    Raises:
        ConfigError: a part that is none, a run that is no safe name or stands there twice.
    """
    roots: dict[str, str] = {}
    for part in text.split():
        run, equals, url = part.partition("=")
        if not equals or not url:
            msg = f"{ROOTS} must hold run=URL pairs separated by spaces, got {part!r}"
            raise ConfigError(msg)
        check_run_name(run)
        if run in roots:
            msg = f"{ROOTS} names the run {run!r} twice; a run has one root"
            raise ConfigError(msg)
        if "://" not in url and not Path(url).is_absolute():
            msg = f"{ROOTS} must give {run!r} an absolute path or a URL, got {url!r}"
            raise ConfigError(msg)
        roots[run] = url
    return roots


def _seconds(text: str | None) -> float:
    try:
        value = DEFAULT_TIMEOUT_S if text is None else float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 24 * 3600:
        msg = f"{TIMEOUT} must be a number of seconds above 0, got {text!r}"
        raise ConfigError(msg)
    return value


def parse_request(name: object, runs: Collection[str]) -> tuple[str, int]:
    """(run, number) that a name from a request stands for.

    Raises:
        Refused: it is not the exact name of a version of one of the runs.
    """
    if not isinstance(name, str):
        raise Refused(f"a name is text, not {type(name).__name__}")
    if len(name) > MAX_NAME:
        raise Refused(f"it is {len(name)} characters long, versions' names have at most {MAX_NAME}")
    pair = parse_version_name(name)
    if pair is None:
        raise Refused(_why_no_version(name, runs))
    if pair[0] not in runs:
        raise Refused(f"no root is configured for this run; {ROOTS} has {_listed(runs)}")
    return pair


def _why_no_version(name: str, runs: Collection[str]) -> str:
    run = next((run for run in sorted(runs, key=len, reverse=True) if name.startswith(run)), None)
    rest = "" if run is None else name[len(run) :]
    short = _SHORT.fullmatch(rest)
    if run is not None and short is not None and len(short[1]) < 8:
        exact = version_name(run, int(short[1]))
        return f"the numbers of versions have eight digits: write {exact}"
    if name == "latest" or (run is not None and rest in _MOVING):
        return (
            "it names whatever is newest, and the engine would go on serving that after a newer "
            "one is published; ask for an exact version, such as run7-v00000042"
        )
    return "it is not a version's name; they are written like run7-v00000042"


def _listed(runs: Collection[str]) -> str:
    return ", ".join(sorted(runs))


class VersionResolver:
    """Resolves names to directories in one cache; opens nothing before the first request.

    Args:
        settings: roots, cache and bounds.
    """

    def __init__(self, settings: ResolverSettings) -> None:
        self.settings = settings
        self._mutex = threading.Lock()
        self._cache: VersionCache | None = None
        self._registries: dict[str, Registry] = {}
        self._served: dict[str, str | None] = {}
        self._resolved: dict[str, Path] = {}

    def refusal(self, name: object) -> str | None:
        """Why a name is refused without a look at any store, or None."""
        try:
            parse_request(name, self.settings.roots)
        except Refused as refused:
            return str(refused)
        return None

    def resolve(self, base_model: str, name: object) -> Path:
        """The directory of a version, verified; it stays while this process lives.

        Args:
            base_model: the model that the server runs, as it was started with.
            name: from a request.

        Raises:
            Refused: no exact name of a configured run, no such version, damaged, or trained over
                another base model.
            StorageError: the root or the disk failed; a later try may succeed.
            CacheFull: everything in the cache may be in use.
            ConfigError: the cache belongs to another process or root.
        """
        run, number = parse_request(name, self.settings.roots)
        exact = version_name(run, number)
        known = self._resolved.get(exact)
        if known is not None:
            return known
        registry, cache = self._open(run)
        try:
            version = registry.get(number)
            check_base(exact, version.base, self._served_hash(base_model))
            # Before it is there, and for ever: the server may read the file again at any time, and
            # does not say when it has let go.
            cache.use_also(exact)
            path = cache.get(registry, version)
        except NoCheckpoint as error:
            raise Refused(f"there is no such version: {error}") from error
        except (BaseMismatch, DamagedError) as error:
            raise Refused(str(error)) from error
        self._resolved[exact] = path
        return path

    def close(self) -> None:
        """Close the stores and give the cache up."""
        with self._mutex:
            for registry in self._registries.values():
                registry.close()
            self._registries.clear()
            if self._cache is not None:
                self._cache.close()
            self._cache = None

    def _open(self, run: str) -> tuple[Registry, VersionCache]:
        with self._mutex:
            if self._cache is None:
                self._cache = VersionCache(self.settings.cache, max_bytes=self.settings.cache_bytes)
                self._cache.use(())  # a server that has just started serves nothing yet
            if run not in self._registries:
                self._registries[run] = Registry(self.settings.roots[run], run=run)
            return self._registries[run], self._cache

    def _served_hash(self, base_model: str) -> str | None:
        if self.settings.base_hash is not None:
            return self.settings.base_hash
        if base_model not in self._served:
            self._served[base_model] = config_hash(Path(base_model))
            if self._served[base_model] is None:
                log.warning(
                    "the base model %s has no directory here, so that adapters are not compared "
                    "with it; set %s",
                    ascii(base_model),
                    BASE_HASH,
                )
        return self._served[base_model]
