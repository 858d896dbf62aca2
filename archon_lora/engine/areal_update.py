"""One update of AReaL's rollout engines: a version is made, loaded by its own name, and proven.

AReaL's order is kept (pause, announce under ``name_resolve``, load, continue), with these
differences: the version is complete before generation is paused; what is loaded lies in a directory
of its own that nobody changes; an error lets generation go on with the version before; and every
rank knows.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archon_lora.errors import ArchonLoraError
from ckpt import CheckpointManager, Retention
from ckpt.handoff import Registry
from ckpt.handoff.engine import Engine
from ckpt.peft import local_directory, write_adapter_dir

from .adapter_stream import AdapterStream
from .agree import agree, attempt, deadline_of, gather_json, rank_of

if TYPE_CHECKING:
    from .areal import ArchonLoRA, HandOver

_log = logging.getLogger(__name__)


class LeasedVersions:
    """The versions that rollouts may still use, each protected from deletion.

    Args:
        registry: of the root.
        keep: how many.
        lease_s: seconds that a lease lasts.
        copies: directory with copies of this process's own, one a version; None if there are none.
    """

    def __init__(
        self, registry: Registry, keep: int, lease_s: float, copies: Path | None = None
    ) -> None:
        self.registry = registry
        self._copies = copies
        self._keep = keep
        self._lease_s = lease_s
        self._holder = f"areal-{socket.gethostname()}-{os.getpid()}".replace(".", "-")
        self.names: list[str] = []

    def take(self, name: str) -> None:
        """Protect a version and those before it; the ones that are too old are given up.

        Raises:
            CkptError: the version is not there, or the store failed.
        """
        self.names.append(name)
        for old in self.names[: -self._keep]:
            self.registry.release(old, self._holder)
            if self._copies is not None:
                shutil.rmtree(self._copies / old, ignore_errors=True)
        self.names = self.names[-self._keep :]
        for held in self.names:
            self.registry.lease(held, self._holder, self._lease_s)

    def close(self) -> None:
        """Give all of them back."""
        for name in self.names:
            self.registry.release(name, self._holder)
        self.registry.close()


def hand_over(engine: ArchonLoRA, meta: Any, options: HandOver) -> None:
    """Serve the adapter as version ``meta.version``; every rank must call.

    Args:
        engine: its adapter and its ``rollout_engine``.
        meta: AReaL's ``WeightUpdateMeta``; neither it nor its directory is changed where a root is
            configured.
        options: where versions go.

    Raises:
        ArchonLoraError: a kind of update that has no adapter in it, or a version that is not above
            the present one.
        CkptError: the version could not be published, or a replica did not prove that it
            serves it. The engine keeps its version, and generation goes on with it.
        PeerFailed: one of these happened on another rank.
    """
    group, timeout = engine.cpu_group, deadline_of(engine)
    with attempt(group, what="checking the update", timeout=timeout):
        _check(engine, meta)
    directory, name = _make(engine, meta, options)
    error: Exception | None = None
    if rank_of(group) == 0:
        try:
            with _paused(engine.rollout_engine):
                _load(engine, meta, directory, options)
        except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
            error = caught
    agree(
        group,
        error,
        what=f"loading version {meta.version} into the rollout engines",
        timeout=timeout + options.load_timeout_s,
    )
    engine.handed_over = meta.version
    _log.info("version %d (%s) is loaded from %s", meta.version, name, directory)


def _check(engine: ArchonLoRA, meta: Any) -> None:
    if meta.type != "disk":
        msg = (
            f"with use_lora the adapter is handed over through a directory, got the type "
            f"{meta.type!r}, which sends the whole model: set weight_update_mode: disk"
        )
        raise ArchonLoraError(msg)
    if not meta.use_lora or not meta.lora_name:
        msg = (
            "the weight update names no adapter: build it with WeightUpdateMeta.from_disk("
            "use_lora=True, lora_name=...), or the rollout engines would load a whole model"
        )
        raise ArchonLoraError(msg)
    least = engine.get_version() if engine.handed_over is None else engine.handed_over + 1
    if meta.version is None or meta.version < least:
        msg = (
            f"version {meta.version} comes after {least - 1}: a name must never stand for two "
            "policies; use meta.with_version(global_step + 1)"
        )
        raise ArchonLoraError(msg)


def _make(engine: ArchonLoRA, meta: Any, options: HandOver) -> tuple[Path, str]:
    """The version's directory, complete, and its name."""
    if options.root is None:
        return _write(engine, meta), "not published"
    if engine.manager is None:
        engine.manager = CheckpointManager(
            options.root,
            process_group=engine.cpu_group,
            retention=Retention(versions=options.in_flight),
            run_name=options.run,
            publish_dtype=options.dtype,
            fresh=True,  # versions are numbered on from what is there; steps lie elsewhere
        )
    state = engine.train_state(
        optimizer=None, scheduler=None, extra={"policy_version": meta.version}
    )
    handle = engine.manager.publish(state, step=meta.version)
    handle.wait()
    version = handle.published.result()
    group, timeout = engine.cpu_group, deadline_of(engine)
    found: list[str] = []
    with attempt(group, what="protecting the version", timeout=timeout):
        if rank_of(group) == 0 and version is not None:
            local = local_directory(options.root)
            # Engines read directories: of another store's versions this node has copies.
            copies = Path(meta.path).absolute().parent / "versions"
            if engine.leased is None:
                registry = Registry(options.root)
                own = None if local is not None else copies
                engine.leased = LeasedVersions(registry, options.in_flight, options.lease_s, own)
            engine.leased.take(version.name)
            where = (
                local / "adapters" / version.name
                if local is not None
                else engine.leased.registry.fetch(version.name, copies)
            )
            found = [str(where), version.name]
    where_and_name: list[str] = gather_json(group, found, timeout=timeout)[0]
    return Path(where_and_name[0]), where_and_name[1]


def _write(engine: ArchonLoRA, meta: Any) -> Path:
    """AReaL's own directory, as a PEFT adapter in the form that engines compute alike."""
    group, timeout = engine.cpu_group, deadline_of(engine)
    stream = AdapterStream(engine, base_model_name=engine.base_name, normalise=True)
    error: Exception | None = None
    if stream.is_writer:
        try:
            write_adapter_dir(meta.path, stream.weights(), stream.peft_config, overwrite=True)
        except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
            error = caught
    stream.finish()
    agree(group, error, what=f"writing the adapter to {meta.path}", timeout=timeout)
    return Path(meta.path).absolute()


@contextmanager
def _paused(client: Any) -> Iterator[None]:
    """Generation is paused within the block, and goes on after it whatever happens in it."""
    client.pause_generation()
    try:
        yield
    finally:
        client.continue_generation()


def _load(engine: ArchonLoRA, meta: Any, directory: Path, options: HandOver) -> None:
    """Have AReaL's client load the directory, and have every replica show that it did."""
    from areal.utils import name_resolve, names

    wanted = copy.copy(meta)
    wanted.path = str(directory)
    if options.root is not None:
        # It is a version, and others may be reading it; retention deletes it when nobody does.
        wanted.clear_checkpoint_after_load = False
    loaded = engine.rollout_engine.update_weights_from_disk(wanted)
    config = engine.config
    # AReaL's client waits for this name, under the version that it has now.
    key = names.update_weights_from_disk(
        config.experiment_name, config.trial_name, engine.get_version()
    )
    name_resolve.add(key, str(time.time()), keepalive_ttl=120, replace=True)
    loaded.result(timeout=options.load_timeout_s)
    if options.engine is not None and engine.leased is not None:
        version = engine.leased.registry.get(directory.name)
        served = f"{meta.lora_name}-v{meta.version}"
        for address in engine.rollout_engine.addresses:
            _prove(options.engine, address, version, directory, served)


def _prove(kind: str, address: str, version: Any, directory: Path, served: str) -> None:
    from ckpt.handoff.drivers import open_engine
    from ckpt.handoff.proof import prove

    url = address if "://" in address else f"http://{address}"
    replica = open_engine(f"{kind}+{url}")
    try:
        evidence = prove(_Renamed(replica, version.name, served), version, directory)
    finally:
        replica.close()
    _log.info("%s serves %s as %s: %s", url, version.name, served, evidence)


class _Renamed:
    """A replica that knows one version by the name that AReaL gave it."""

    def __init__(self, engine: Engine, name: str, served: str) -> None:
        self._engine = engine
        self._name = name
        self._served = served

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def adapters(self) -> dict[str, str | None]:
        """What it lists, with the version under its own name."""
        listed = self._engine.adapters()
        return {self._name if n == self._served else n: path for n, path in listed.items()}

    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> list[float]:
        """Its answer under the version's own name."""
        asked = self._served if adapter == self._name else adapter
        return self._engine.logprobs(token_ids, asked)
