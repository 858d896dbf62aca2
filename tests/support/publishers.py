"""Functions that run in processes of their own and publish versions."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from ckpt.layout import new_attempt
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.storage.faultpoints import ENVIRONMENT
from support.steps import tiny_adapter


def publish(url: str, run: str, seed: int = 0, options: dict[str, Any] | None = None) -> str:
    """Publish one small adapter; the version's name."""
    tensors, export = tiny_adapter(seed=seed, optimizer=False)
    full = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    manifest = publish_version(
        open_storage(url, options),
        run=run,
        export=export,
        source=MemorySource(full),
        step=seed,
        policy_version=seed,
        epoch=1,
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
