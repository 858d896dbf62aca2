"""Bytes that change after the commit: flipped, cut, lost, of another step, of somebody else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.fault_cells import NEWEST, RUN_SECONDS, Field, Ground
from support.forked import Crew
from support.ranks_faults import restore_all
from support.steps import write_writer

from ckpt.layout import MANIFEST, STATE, step_dir, writer_path
from ckpt.shard import LENGTH_BYTES

pytestmark = pytest.mark.dist

SHARDS = ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors")
FILES = (*SHARDS, STATE, MANIFEST)


def base(data: bytes) -> int:
    """Where a shard's tensors begin."""
    return LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")


# Region of a file → one of its bytes, from the file's content.
SHARD_REGIONS: dict[str, Callable[[bytes], int]] = {
    "length field": lambda data: 1,
    "header": lambda data: base(data) // 2,
    "end of the header": lambda data: base(data) - 1,
    "first tensor": base,
    "middle": lambda data: (base(data) + len(data)) // 2,
    "last byte": lambda data: len(data) - 1,
}
DOCUMENT_REGIONS: dict[str, Callable[[bytes], int]] = {
    "first byte": lambda data: 0,
    "a digit": lambda data: next(i for i, byte in enumerate(data) if byte in b"123456789"),
    "middle": lambda data: len(data) // 2,
    "last byte": lambda data: len(data) - 1,
}


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes | None]] = {
    "cut by a byte": lambda data, _older: data[:-1],
    "cut in half": lambda data, _older: data[: len(data) // 2],
    "empty": lambda data, _older: b"",
    "longer by a byte": lambda data, _older: data + b"\0",
    "missing": lambda data, _older: None,
    "stale: of the step before": lambda data, older: older,
    "foreign": lambda data, _older: os.urandom(len(data)),
    "zeroed": lambda data, _older: bytes(len(data)),
}

TABLE = [
    *((file, f"bit in: {region}") for file in SHARDS for region in SHARD_REGIONS),
    *((file, f"bit in: {region}") for file in (STATE, MANIFEST) for region in DOCUMENT_REGIONS),
    *((file, damage) for file in FILES for damage in DAMAGES),
]
FLAVOURS = ["posix", pytest.param("s3", marks=pytest.mark.s3)]


def spoiled(file: str, damage: str, data: bytes, older: bytes) -> bytes | None:
    """The file's new content; None if it is to be deleted."""
    region = damage.removeprefix("bit in: ")
    if region == damage:
        return DAMAGES[damage](data, older)
    regions = SHARD_REGIONS if file in SHARDS else DOCUMENT_REGIONS
    return flip(data, regions[region](data))


def find(ground: Ground, step: int, file: str) -> str:
    """Path of a step's file; on an object store it may lie below the attempt."""
    directory = step_dir(step, 1)
    for entry in ground.storage.list(directory):
        if entry.name == file:
            return f"{directory}/{file}"
        inner = f"{directory}/{entry.name}/{file}"
        if entry.is_dir and ground.storage.exists(inner):
            return inner
    raise AssertionError(f"step {step} has no {file}")


def put(ground: Ground, path: str, data: bytes | None) -> None:
    """Change a file behind the trainer's back."""
    if data is None:
        ground.storage.delete(path)
    elif ground.flavour == "posix":
        Path(ground.url, path).write_bytes(data)
    else:
        ground.storage.put(path, data)


@pytest.mark.cells(6)
@pytest.mark.parametrize(("file", "damage"), TABLE)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_file_of_the_newest_step_is_damaged(
    field: Field, flavour: str, file: str, damage: str
) -> None:
    """The step before is restored with a message, by one rank and by two; the run goes on."""
    ground = field.ground(flavour)
    path, older = find(ground, NEWEST, file), find(ground, NEWEST - 1, file)
    data, before = ground.storage.read(path), ground.storage.read(older)
    changed = spoiled(file, damage, data, before)
    assert changed != data
    put(ground, path, changed)
    # On an object store the manifest *is* the step: without it there is nothing but remains.
    gone = flavour != "posix" and file == MANIFEST and changed is None
    named = None if gone else file
    with Crew(2, restore_all, [ground.url], ground.options) as crew:
        crew.join(timeout=RUN_SECONDS)
        for rank in (0, 1):
            (seen,) = crew.result(rank)
            if rank == 0:
                ground.judge(seen.start, seen.digest, NEWEST - 1)
            assert seen.errors == []
            assert all(named and named in reason for reason in seen.damaged), seen.damaged
            assert bool(seen.damaged) == (not gone)
    ground.restore(NEWEST - 1, damaged=named)
    ground.go_on(NEWEST - 1, damaged=named)


RECORDS = [name for name in DAMAGES if not name.startswith("stale")]


@pytest.mark.cells(1)
@pytest.mark.parametrize("damage", ["bit in: middle", *RECORDS])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_newest_writers_record_is_damaged(
    field: Field, flavour: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What that writer saved is still known to be the newest; what lies behind it is not."""
    ground = field.ground(flavour)
    path = writer_path(1)
    data = ground.storage.read(path)
    put(ground, path, spoiled(STATE, damage, data, b""))
    ground.go_on(NEWEST, records=path)
    assert "writers/0001.json" in caplog.text


@pytest.mark.cells(1)
@pytest.mark.parametrize("damage", ["bit in: middle", *RECORDS])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_record_of_a_later_writer_is_damaged(
    field: Field, flavour: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run does not fall back to the writer before it, whose record is whole."""
    ground = field.ground(flavour)
    ground.go_on(NEWEST)
    path = writer_path(2)
    put(ground, path, spoiled(STATE, damage, ground.storage.read(path), b""))
    ground.go_on(NEWEST + 1, tag="d", records=path)
    assert "writers/0002.json" in caplog.text


@pytest.mark.cells(1)
@pytest.mark.parametrize("damage", ["bit in: middle", *RECORDS])
def test_a_record_is_damaged_whose_writer_saved_nothing(field: Field, damage: str) -> None:
    """Nobody knows where that writer resumed, so nothing is guessed (or it never was)."""
    ground = field.ground("posix")
    write_writer(ground.storage, 2, parent=(0, 1))
    put(ground, writer_path(2), spoiled(STATE, damage, ground.storage.read(writer_path(2)), b""))
    if damage == "missing":
        ground.go_on(NEWEST)
    else:
        ground.refuses("writers/0002.json")


FOREIGN = [
    "steps/notes.txt",
    "steps/step-00000099/MANIFEST.json",
    "steps/step-00000099.w0001x/MANIFEST.json",
    "steps/step-00000099.w0001.bak/MANIFEST.json",
    "steps/.tmp-00000099-abcdefgh/MANIFEST.json",
    f"{step_dir(NEWEST, 1)}/extra.bin",
    "writers/0002.json.bak",
    "writers/latest.json",
    "adapters/readme",
    "LATEST",
]


@pytest.mark.cells(2)
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_files_of_somebody_else_change_nothing(field: Field, flavour: str, name: str) -> None:
    """Nor are they deleted, except for what looks like this package's own unfinished work."""
    ground = field.ground(flavour)
    ground.storage.put(name, b"step-00000000.w0001")
    ground.go_on(NEWEST)
    assert ground.storage.exists(name) == ("/.tmp-" not in name)


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_step_is_damaged(field: Field, flavour: str) -> None:
    """Then there is no restore, and no new beginning either."""
    ground = field.ground(flavour)
    for step in (0, NEWEST):
        path = find(ground, step, SHARDS[step % 2])
        put(ground, path, flip(ground.storage.read(path), 200))
    ground.refuses("none of the 2 step(s) verifies", *SHARDS)


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_whole_step_under_another_name(field: Field, flavour: str) -> None:
    """A copied step directory is told by its manifest, not by its name."""
    ground = field.ground(flavour)
    old, new = step_dir(0, 1), step_dir(5, 1)
    for path, data in field.plant(flavour).files.items():
        if path.startswith(old):
            ground.storage.put(new + path.removeprefix(old), data)
    ground.restore(NEWEST, damaged="that of step 0")
