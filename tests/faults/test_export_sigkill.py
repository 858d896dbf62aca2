"""Exports that are killed: whoever reads the directory sees a whole adapter or none."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from support import exporters
from support.steps import tiny_adapter, write_step
from support.warm_start import start

from ckpt.consolidate import consolidate
from ckpt.errors import ObjectNotFound, StorageError
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from ckpt.storage import open_storage
from ckpt.storage.faultpoints import POSIX_POINTS

STREAMED = tuple(point for point in POSIX_POINTS if "put_new" not in point)


def make_root(url: str, options: dict[str, Any] | None = None) -> None:
    """Steps 1 and 2, whose adapters have other values and another rank."""
    for step, rank in ((1, 4), (2, 8)):
        tensors, export = tiny_adapter(rank=rank, seed=step)
        write_step(open_storage(url, options), step, tensors, world=2, export=export)


def whole(directory: str, options: dict[str, Any] | None = None) -> tuple[bytes, bytes] | None:
    """What a reader that waits for the configuration finds: both files, or None."""
    store = open_storage(directory, options)
    try:
        config = store.read(CONFIG_NAME)
    except ObjectNotFound:
        return None
    return config, store.read(WEIGHTS_NAME)


def run_to_death(*arguments: Any) -> bool:
    """Whether the export was killed; False if it ended by itself."""
    child = start(exporters.export_and_die, *arguments)
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.slow
@pytest.mark.parametrize("point", STREAMED)
def test_killed_at_every_pass_of_a_point(tmp_path: Path, point: str) -> None:
    make_root(str(tmp_path / "root"))
    adapters = []
    for step in (1, 2):
        consolidate(tmp_path / "root", step, tmp_path / f"want{step}")
        adapters.append(whole(str(tmp_path / f"want{step}")))
    kills = 0
    for nth in range(1, 5):
        fault = f"{point}:{nth}=kill"
        fresh, old = tmp_path / f"fresh{nth}", tmp_path / f"old{nth}"
        consolidate(tmp_path / "root", 1, old)
        died = run_to_death(str(tmp_path / "root"), 2, str(fresh), fault, None)
        assert whole(str(fresh)) in ([None, adapters[1]] if died else [adapters[1]])
        assert fresh.exists() is (whole(str(fresh)) is not None)  # no half of a directory
        again = run_to_death(str(tmp_path / "root"), 2, str(old), fault, None)
        assert whole(str(old)) in (adapters if again else [adapters[1]])
        kills += died + again
        # The next one is not in the way of what is left.
        consolidate(tmp_path / "root", 2, fresh, overwrite=True)
        assert whole(str(fresh)) == adapters[1]
        if not died and not again:
            break
    assert kills


@pytest.mark.slow
@pytest.mark.s3
def test_killed_on_the_way_to_s3(s3: Any, tmp_path: Path) -> None:
    root, options = s3.url("root"), s3.storage_options
    make_root(root, options)
    adapters = []
    for step in (1, 2):
        consolidate(root, step, tmp_path / f"want{step}", storage_options=options)
        adapters.append(whole(str(tmp_path / f"want{step}")))
    # Killed before the weights, there is nothing.
    none = s3.url("none")
    assert run_to_death(root, 2, none, "object.put.before=kill", options)
    assert open_storage(none, options).list("") == []
    # The weights are there and the configuration is not; then both are.
    for point, after in (("object.put.before", None), ("object.put.after", adapters[1])):
        fresh, old = s3.url("fresh"), s3.url("old")
        consolidate(root, 1, old, storage_options=options)
        for out in (fresh, old):  # without a rename the old one goes first: never a mixture
            assert run_to_death(root, 2, out, f"{point}:2=kill", options)
            assert whole(out, options) == after
            assert open_storage(out, options).exists(WEIGHTS_NAME)


@pytest.mark.slow
def test_a_reader_beside_an_export_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    make_root(str(root))
    consolidate(root, 1, out)
    seen = set()
    for pause in (0.3, 0.5, 0.7):
        child = start(exporters.export_again_and_again, str(root), str(out), daemon=True)
        end = time.monotonic() + pause
        while time.monotonic() < end or len(seen) < 2:
            seen.add(read_one(out))
        os.kill(child.pid, signal.SIGKILL)
        child.join(30)
        seen.add(read_one(out))
    assert seen == {4, 8}


def read_one(out: Path) -> int:
    """The rank of the adapter, whose two files must be of one and the same."""
    directory = os.open(out, os.O_RDONLY)  # as one who entered it once would see it
    try:
        config, tensors = read_adapter(f"/proc/self/fd/{directory}")
    except (ObjectNotFound, StorageError):
        # It was exchanged and deleted meanwhile: nothing, which is never a mixture.
        return read_one(out)
    finally:
        os.close(directory)
    ranks = {t.shape[0] for key, t in tensors.items() if "lora_A" in key}
    assert ranks == {config["r"]}
    return config["r"]
