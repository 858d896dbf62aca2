"""Functions that run in processes of their own and publish versions."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

from ckpt.checksum import sha256_hex, verify_file
from ckpt.handoff import Registry, Version
from ckpt.layout import MANIFEST, new_attempt
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import Storage, open_storage
from ckpt.storage.faultpoints import ENVIRONMENT
from support.steps import tiny_adapter, write_step

LAST_STEP = 999
"""The step whose version ends :func:`watch`."""


def publish(url: str, run: str, seed: int = 0, options: dict[str, Any] | None = None) -> str:
    """Publish one small adapter; the version's name."""
    return publish_to(open_storage(url, options), run, seed)


def publish_to(storage: Storage, run: str, seed: int = 0, *, epoch: int = 1) -> str:
    """Publish one small adapter to an open store; the version's name."""
    tensors, export = tiny_adapter(seed=seed, optimizer=False)
    full = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    manifest = publish_version(
        storage,
        run=run,
        export=export,
        source=MemorySource(full),
        step=seed,
        policy_version=seed,
        epoch=epoch,
        attempt=new_attempt(),
        base=None,
    )
    return manifest.name


def publish_and_die(url: str, run: str, fault: str, options: dict[str, Any] | None) -> None:
    """Publish in a process that kills itself at a named point."""
    os.environ[ENVIRONMENT] = fault
    publish(url, run, 0, options)


def publish_many(
    url: str, run: str, count: int, start: Any, names: multiprocessing.Queue[list[str]]
) -> None:
    """Wait for the others, then publish ``count`` versions as fast as possible."""
    start.wait(60)
    names.put([publish(url, run, seed) for seed in range(count)])


def publish_group(
    _rank: int, _world: int, url: str, run: str, count: int, options: dict[str, Any] | None
) -> list[str]:
    """Publish ``count`` versions as fast as possible; their names."""
    return [publish(url, run, seed, options) for seed in range(count)]


def publish_under_fault(
    _rank: int, _world: int, url: str, run: str, fault: str, options: dict[str, Any] | None
) -> None:
    """Publish in a process that kills itself at a pass of a named point, if it comes to that."""
    publish_and_die(url, run, fault, options)


def fetch_under_fault(_rank: int, _world: int, url: str, cache: str, fault: str) -> None:
    """Fetch version 1 in a process that kills itself at a pass of a named point."""
    os.environ[ENVIRONMENT] = fault
    Registry(url).fetch(1, cache)


def watch(
    _rank: int, _world: int, url: str, run: str, cache: str, options: dict[str, Any] | None
) -> list[str]:
    """Follow a run as an engine's sidecar would; the names of what was seen, in order.

    Ends with the version of step :data:`LAST_STEP`. Every version is copied and its copy read.
    """
    registry = Registry(url, run=run, storage_options=options)
    seen: list[Version] = []
    while not seen or seen[-1].step != LAST_STEP:
        newest = registry.wait_for(seen[-1] if seen else None, timeout=60, poll_s=0.005)
        copy = registry.fetch(newest, cache)
        content = {path.name: path.read_bytes() for path in copy.iterdir()}
        assert set(content) == {MANIFEST, CONFIG_NAME, WEIGHTS_NAME}
        assert sha256_hex([content[WEIGHTS_NAME]]) == newest.adapter_sha256
        assert VersionManifest.from_bytes(content[MANIFEST], "copy").name == newest.name
        for file in newest.files:
            verify_file(file, content[file.name], file.name)
        seen.append(newest)
    registry.close()
    return [version.name for version in seen]


def two_steps_and_a_version(root: Path) -> Path:
    """A run with steps 10 and 20, whose adapter is published as ``run7-v00000001``."""
    storage = open_storage(root)
    tensors, export = tiny_adapter()
    for step in (10, 20):
        write_step(storage, step, tensors, export=export)
    publish(str(root), "run7")
    return root
