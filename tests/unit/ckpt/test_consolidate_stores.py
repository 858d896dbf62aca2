"""Exports from any store to any other, in bounded memory."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from support import exporters
from support.steps import tiny_adapter, write_step

from ckpt.consolidate import consolidate
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.storage import open_storage

MIB = 2**20


@pytest.mark.s3
@pytest.mark.parametrize("source", ["local", "s3"])
@pytest.mark.parametrize("target", ["local", "s3"])
def test_the_bytes_are_the_same_from_and_to_any_store(
    tmp_path: Path, s3: Any, source: str, target: str
) -> None:
    tensors, export = tiny_adapter(rank=5, scale=1.7)
    write_step(open_storage(tmp_path / "first"), 7, tensors, export=export)
    consolidate(tmp_path / "first", 7, tmp_path / "want")
    root = s3.url("root") if source == "s3" else str(tmp_path / "root")
    out = s3.url("out") if target == "s3" else str(tmp_path / "out")
    ours = {"s3": s3.storage_options, "local": None}
    write_step(open_storage(root, ours[source]), 7, tensors, world=3, dim=1, export=export)
    more = {"out_storage_options": ours[target]} if source != target else {}
    consolidate(root, None, out, storage_options=ours[source], **more)
    store = open_storage(out, ours[target])
    assert [entry.name for entry in store.list("")] == [CONFIG_NAME, WEIGHTS_NAME]
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert store.read(name) == (tmp_path / "want" / name).read_bytes()


def grown(url: str, out: str, cache: int, options: dict[str, Any] | None = None) -> int:
    """How much the memory of a process grows that exports a large step."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=exporters.growth_of, args=(url, out, cache, options, answer))
    child.start()
    value = answer.get(timeout=120)
    child.join(60)
    return value


@pytest.mark.slow
def test_memory_stays_bounded(tmp_path: Path) -> None:
    exporters.large_step(str(tmp_path / "root"), megabytes=128, world=2, options=None)
    more = grown(str(tmp_path / "root"), str(tmp_path / "out"), 16 * MIB)
    size = (tmp_path / "out-second" / WEIGHTS_NAME).stat().st_size
    assert size > 128 * MIB
    assert more < 80 * MIB, f"{more / MIB:.0f} MiB"
