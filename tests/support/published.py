"""Small published versions, and what can be done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt.layout import new_attempt, version_dir
from ckpt.peft import WEIGHTS_NAME
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.types import BaseIdentity
from support.steps import tiny_adapter


def publish_one(
    url: str | Path,
    run: str = "run7",
    seed: int = 0,
    *,
    base: BaseIdentity | None = None,
    probe: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """Publish a small adapter; its name. Each seed gives other bytes."""
    tensors, export = tiny_adapter(seed=seed, optimizer=False)
    store = open_storage(str(url), options)
    try:
        return publish_version(
            store,
            run=run,
            export=export,
            source=MemorySource({n.removeprefix("model."): t for n, t in tensors.items()}),
            step=seed,
            policy_version=seed,
            epoch=1,
            attempt=new_attempt(),
            base=base,
            probe=probe,
        ).name
    finally:
        store.close()


def damage(url: str | Path, name: str, options: dict[str, Any] | None = None) -> None:
    """Flip one byte of a version's weights, at the root."""
    run, _, number = name.rpartition("-v")
    path = f"{version_dir(run, int(number))}/{WEIGHTS_NAME}"
    store = open_storage(str(url), options)
    try:
        data = bytearray(store.read(path))
        data[-1] ^= 1
        store.put(path, bytes(data))
    finally:
        store.close()
