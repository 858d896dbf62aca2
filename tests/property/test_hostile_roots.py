"""A whole root under generated damage: every reader ends in a result or an error of ours.

Some of the damage is that of a forger, who can compute hashes and checksums. Nothing a file says
may make a reader crash, run code, or take more memory than the files warrant.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.fault_report import MODE
from support.ranks_faults import Toy

from ckpt import CheckpointManager, CkptError
from ckpt.catalog import check_step, check_writers, list_steps
from ckpt.checksum import file_record
from ckpt.claim import CLAIM_FORMAT, CLAIM_SCHEMA
from ckpt.consolidate import consolidate
from ckpt.envelope import seal, unseal, utc_now
from ckpt.errors import ConfigError
from ckpt.handoff import Registry
from ckpt.handoff.replica_record import EngineRecord, ReplicaRecord, read_replicas
from ckpt.layout import MANIFEST, STATE, replica_path
from ckpt.manifest import SCHEMA
from ckpt.retain import Retention, review
from ckpt.storage import open_storage
from ckpt.timeline_store import read_timeline
from ckpt.version_retain import review_versions
from ckpt.versions import check_version, list_versions

settings.register_profile(
    "hostile",
    deadline=None,
    max_examples=300 if os.environ[MODE] == "full" else 15,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
hostile = settings.get_profile("hostile")

MEMORY = 6_000_000
"""Bytes that reading may take at once: the root's files have 0.2 MB."""


@pytest.fixture(scope="module")
def grown() -> Iterator[Path]:
    """A root with two steps and a version, made by a real manager."""
    with tempfile.TemporaryDirectory(prefix="grown-") as folder:
        toy = Toy(tag="h")
        with CheckpointManager(folder) as manager:
            for step in (0, 1):
                toy.step()
                manager.save(step, toy.state, publish=step == 1)
        record = ReplicaRecord(
            holder="me",
            run="run",
            host="h",
            at=utc_now(),
            every_s=60.0,
            stopped=False,
            current="run-v00000001",
            newest=1,
            engines=(EngineRecord("http://a", True, None, None, None, "none"),),
        )
        Path(folder, "replicas").mkdir()
        Path(folder, replica_path("me")).write_bytes(record.to_bytes())
        # The first reading also imports modules and fills caches, which is no attack's doing.
        with tempfile.TemporaryDirectory(prefix="warm-") as warm:
            assert read_everything(str(shutil.copytree(folder, Path(warm, "root")))) == 1
        yield Path(folder)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def read_everything(root: str) -> int | None:
    """Every reader there is; the step that a restore gives, None where it refuses."""
    storage = open_storage(root)
    readers: list[Callable[[], object]] = [
        lambda: [list(check_step(storage, entry)) for entry in list_steps(storage)],
        lambda: [list(check_version(storage, entry)) for entry in list_versions(storage)],
        lambda: list(check_writers(storage)),
        lambda: review(storage, Retention(latest=1)),
        lambda: review_versions(storage, 1),
        lambda: read_timeline(storage),
        lambda: read_replicas(storage),
        lambda: Registry(storage).latest(),
        lambda: Registry(storage).fetch(1, f"{root}-fetched"),
        lambda: consolidate(root, 1, f"{root}-adapter"),
        lambda: consolidate(root, 0, f"{root}-older"),
    ]
    for read in readers:
        try:
            read()
        except CkptError:
            continue
    toy = Toy()
    before = toy.digest()
    with CheckpointManager(root) as manager:
        try:
            return manager.restore(toy.state)
        except CkptError as error:
            # The data position is the caller's own object, and the last that is asked.
            partly = "The live state is partly that of the step" in str(error)
            assert partly or toy.digest() == before, "a refused restore changes nothing"
            return None


def attack(grown: Path, change: Callable[[Path], None]) -> int | None:
    """Copy the root, damage the copy, and read it with an eye on the memory.

    What is over the bound is read once more: a table of the interpreter's own that happens to
    grow meanwhile (of interned names: 7.9 MB) does so once, an allocation that a file provokes
    every time.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        damaged = Path(folder, "damaged")
        shutil.copytree(grown, damaged)
        change(damaged)
        peaks = []
        for reading in ("first", "second"):
            root = shutil.copytree(damaged, Path(folder, reading, "root"))
            # What earlier attacks left in cycles is not this one's, whenever it would be freed.
            gc.collect()
            tracemalloc.start()
            try:
                found = read_everything(str(root))
                peaks.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()
            if peaks[-1] < MEMORY:
                return found
        pytest.fail(f"two readings took {peaks} bytes at once, wanted below {MEMORY}")


def test_an_untouched_root_is_read(grown: Path) -> None:
    assert attack(grown, lambda _root: None) == 1


@settings(hostile)
@given(data=st.data())
def test_any_bytes_in_any_file(grown: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(files(grown)))
    content = (grown / name).read_bytes()
    kind = data.draw(st.sampled_from(["other", "edited", "cut", "longer"]))
    if kind == "other":
        new = data.draw(st.binary(max_size=300))
    elif kind == "edited":
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(st.binary(min_size=1, max_size=8))
        new = content[:at] + piece + content[at + len(piece) :]
    elif kind == "cut":
        new = content[: data.draw(st.integers(0, len(content)))]
    else:
        new = content + data.draw(st.binary(min_size=1, max_size=100))
    found = attack(grown, lambda root: (root / name).write_bytes(new) and None)
    if new != content and name.startswith("steps/step-00000001"):
        assert found == 0, "a damaged step was restored, or the one before it was not"


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([2**31, 2**62, 2**63, -(2**63), 10**30])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "..", "/etc/passwd", "../../x", "F32", "model.a", "optim.a.exp_avg"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def replaced(document: Any, data: st.DataObject, value: Any) -> Any:
    """The document with one part of it, anywhere, put in the place of by the value, or gone."""
    here = isinstance(document, (dict, list)) and len(document) > 0
    if not here or data.draw(st.integers(0, 5)) == 0:
        return value
    keys = list(document) if isinstance(document, dict) else list(range(len(document)))
    key = data.draw(st.sampled_from(keys))
    copy = dict(document) if isinstance(document, dict) else list(document)
    if data.draw(st.integers(0, 7)) == 0:
        del copy[key]
    else:
        copy[key] = replaced(copy[key], data, value)
    return copy


@settings(hostile)
@given(data=st.data(), value=values)
def test_a_forged_manifest(grown: Path, data: st.DataObject, value: Any) -> None:
    """Its hash is right and its content is not."""
    kind, name = data.draw(
        st.sampled_from(
            [
                ("ckpt.step", "steps/step-*1.w0001/MANIFEST.json"),
                ("ckpt.version", "adapters/*/MANIFEST.json"),
                ("ckpt.writer", "writers/0001.json"),
                ("ckpt.timeline", "metrics/*.json"),
                ("ckpt.replicas", "replicas/*.json"),
            ]
        )
    )

    def forge(root: Path) -> None:
        (path,) = root.glob(name)
        body = replaced(json.loads(path.read_bytes()), data, value)
        if isinstance(body, dict):
            for fixed in ("format", "schema", "sha256"):
                body.pop(fixed, None)
            try:
                path.write_bytes(seal(kind, SCHEMA, body))
            except ConfigError:
                path.write_bytes(b"")

    attack(grown, forge)


def forge_state(root: Path, change: Callable[[Any], Any]) -> None:
    """Change the newest step's state.json and make its checksum right again."""
    (path,) = root.glob(f"steps/step-*1.w0001/{STATE}")
    data = json.dumps(change(json.loads(path.read_bytes()))).encode()
    path.write_bytes(data)
    manifest = path.with_name(MANIFEST)
    body = json.loads(manifest.read_bytes())
    record = file_record(STATE, [data])
    for entry in body["files"]:
        if entry["name"] == STATE:
            entry.update(size=record.size, crc32=record.crc32, block_crc32=list(record.block_crc32))
    for fixed in ("format", "schema", "sha256"):
        body.pop(fixed)
    manifest.write_bytes(seal("ckpt.step", SCHEMA, body))


@settings(hostile)
@given(data=st.data(), value=values)
def test_a_forged_state(grown: Path, data: st.DataObject, value: Any) -> None:
    attack(grown, lambda root: forge_state(root, lambda doc: replaced(doc, data, value)))


@settings(hostile)
@given(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()))
def test_a_claim_of_any_bytes(grown: Path, content: bytes) -> None:
    """Only its name counts: the version's number stays taken."""

    def spoil(root: Path) -> None:
        (claim,) = root.glob("adapters/*.claim.json")
        claim.write_bytes(content)

    assert attack(grown, spoil) == 1
    with pytest.raises(CkptError):
        unseal(content, CLAIM_FORMAT, CLAIM_SCHEMA, "x")
