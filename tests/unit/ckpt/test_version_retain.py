"""Retention of versions: by names, and never at the cost of one that is new, held or unfinished."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.publishers import publish_to
from support.steps import write_writer

from ckpt.claim import CLAIM_FORMAT, CLAIM_SCHEMA, read_claim
from ckpt.envelope import seal
from ckpt.errors import DamagedError
from ckpt.holds import pin, release_lease, take_lease
from ckpt.layout import MANIFEST, claim_path, tmp_version_dir, trash_path, version_dir
from ckpt.peft import WEIGHTS_NAME
from ckpt.retain import Keeper
from ckpt.storage import Storage, open_storage
from ckpt.types import Retention
from ckpt.version_retain import REMAINS_AGE_S, apply_fate, put_back_trash, review_versions
from ckpt.versions import list_versions


@pytest.fixture(params=["posix", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A store that renames, and one that cannot."""
    return open_storage(tmp_path if request.param == "posix" else f"memory://{tmp_path.name}")


def name(number: int) -> str:
    return f"run7-v{number:08d}"


def numbers(storage: Storage) -> list[int]:
    return [entry.number for entry in list_versions(storage) if entry.state == "committed"]


def prune(storage: Storage, keep: int) -> dict[int, tuple[bool, str]]:
    """What became of each number, and why."""
    fates = review_versions(storage, keep)
    kept = {fate.entry.number: apply_fate(storage, fate) for fate in fates}
    assert {n for n, held in kept.items() if held} == {f.entry.number for f in fates if f.keep}
    return {fate.entry.number: (fate.keep, fate.reason) for fate in fates}


def claim(storage: Storage, number: int, *, epoch: int = 1, age_s: float = 0.0) -> None:
    """Take a number in the past."""
    created = datetime.now(UTC) - timedelta(seconds=age_s)
    body = {
        "name": name(number),
        "epoch": epoch,
        "attempt": "attempt0",
        "host": "test",
        "pid": 1,
        "created": created.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "nonce": "0" * 32,
    }
    storage.put(claim_path("run7", number), seal(CLAIM_FORMAT, CLAIM_SCHEMA, body))


def begin(storage: Storage, number: int) -> str:
    """Leave a version half-written; its directory."""
    path = version_dir("run7", number)
    if storage.has_rename:
        path = tmp_version_dir(name(number), "attempt0")
    storage.put(f"{path}/{WEIGHTS_NAME}", b"half of it")
    return path


def test_below_the_newest_a_version_goes_unread(storage: Storage) -> None:
    for _ in range(5):
        publish_to(storage, "run7")
    storage.put(f"adapters/{name(1)}/{MANIFEST}", b"no manifest")
    storage.put(f"adapters/{name(2)}/{MANIFEST}", b"no manifest")
    pin(storage, name(2))
    storage.put(f"adapters/{name(4)}/{MANIFEST}", b"no manifest")
    assert prune(storage, 2) == {
        1: (False, "not among the newest 2"),
        2: (True, "pinned"),
        3: (True, "among the newest 2"),
        4: (True, "damaged: not counted, left alone"),
        5: (True, "among the newest 2"),
    }
    assert [entry.number for entry in list_versions(storage)] == [2, 3, 4, 5]
    assert not storage.exists(claim_path("run7", 1))


def test_what_is_held_stays(storage: Storage) -> None:
    for _ in range(4):
        publish_to(storage, "run7")
    take_lease(storage, name(1), "replica-1", 60)
    storage.put(f"leases/{name(2)}/replica-1.json", b"torn")
    found = prune(storage, 1)
    assert {n: reason for n, (keep, reason) in found.items() if keep} == {
        1: "in use by replica-1",
        2: "in use by replica-1",
        4: "among the newest 1",
    }
    assert numbers(storage) == [1, 2, 4]


def test_a_deleted_version_takes_its_old_leases_along(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        publish_to(storage, "run7")
    for number in (1, 2, 3):
        take_lease(storage, name(number), "replica-1", 60)
    release_lease(storage, name(1), "replica-1")
    assert prune(storage, 1)[2] == (True, "in use by replica-1")
    assert [entry.name for entry in storage.list("leases")] == [name(2), name(3)]
    monkeypatch.setattr("ckpt.holds.CLOCK_SKEW_S", -3600.0)  # as if an hour had passed
    prune(storage, 1)
    assert numbers(storage) == [3]
    assert [entry.name for entry in storage.list("leases")] == [name(3)]


def test_a_hold_that_comes_after_the_review_counts(storage: Storage) -> None:
    for _ in range(2):
        publish_to(storage, "run7")
    fates = review_versions(storage, 1)
    pin(storage, name(1))
    assert [apply_fate(storage, fate) for fate in fates] == ["pinned", "among the newest 1"]
    assert numbers(storage) == [1, 2]


def test_runs_are_counted_apart(storage: Storage) -> None:
    for run in ("one", "two"):
        for _ in range(3):
            publish_to(storage, run)
    fates = review_versions(storage, 2)
    assert [fate.entry.name for fate in fates if not fate.keep] == [
        "one-v00000001",
        "two-v00000001",
    ]
    assert {fate.entry.run for fate in review_versions(storage, 2, "two")} == {"two"}


def test_the_highest_number_is_never_given_back(storage: Storage) -> None:
    publish_to(storage, "run7")
    claim(storage, 2)
    claim(storage, 3, age_s=2 * REMAINS_AGE_S)
    begin(storage, 3)
    write_writer(storage, 1)
    write_writer(storage, 2, parent=None)
    assert prune(storage, 1)[3] == (False, "left by a writer that is gone")
    assert storage.exists(claim_path("run7", 3))
    assert publish_to(storage, "run7", epoch=2) == name(4)
    prune(storage, 1)
    left = [entry.name for entry in storage.list("adapters")]
    assert left == [name(4), f"{name(4)}.claim.json"]


@pytest.mark.parametrize(
    ("epoch", "age_s", "goes"),
    [
        (1, REMAINS_AGE_S + 60, True),
        (1, REMAINS_AGE_S - 60, False),  # it may be a slow mirror's
        (2, REMAINS_AGE_S + 60, False),  # nobody has taken over from its writer
    ],
)
@pytest.mark.parametrize("keep", [1, 9])
def test_remains_go_once_their_writer_cannot_come_back(
    storage: Storage, epoch: int, age_s: float, goes: bool, keep: int
) -> None:
    write_writer(storage, 1)
    write_writer(storage, 2, parent=None)
    claim(storage, 1, epoch=epoch, age_s=age_s)
    path = begin(storage, 1)
    assert publish_to(storage, "run7", epoch=2) == name(2)
    (kept, reason), *_ = (
        (fate.keep, fate.reason)
        for fate in review_versions(storage, keep)
        if fate.entry.path == path
    )
    prune(storage, keep)
    assert kept is not goes
    assert ("gone" in reason) is goes
    assert bool(storage.list(path)) is not goes
    assert numbers(storage) == [2]


def test_remains_without_a_readable_claim_stay(storage: Storage) -> None:
    path = begin(storage, 1)
    publish_to(storage, "run7")
    prune(storage, 1)
    storage.put(claim_path("run7", 1), b"torn")
    prune(storage, 1)
    assert storage.list(path)
    with pytest.raises(DamagedError):
        read_claim(storage, "run7", 1)


def test_numbers_that_were_never_used_are_forgotten(storage: Storage) -> None:
    claim(storage, 1)
    claim(storage, 2)
    assert publish_to(storage, "run7") == name(3)
    claim(storage, 4)
    prune(storage, 2)
    assert storage.exists(claim_path("run7", 1)), "two versions are to stay, and there is one"
    prune(storage, 1)
    left = {entry.name for entry in storage.list("adapters") if not entry.is_dir}
    assert left == {f"{name(n)}.claim.json" for n in (3, 4)}
    assert publish_to(storage, "run7") == name(5)


def test_the_keeper_reads_a_version_once(storage: Storage) -> None:
    keeper = Keeper(storage, Retention(versions=3), "run7")
    costs = []
    for _ in range(6):
        publish_to(storage, "run7")
        before = storage.traffic
        keeper.prune_versions()
        costs.append((storage.traffic - before).requests)
    assert numbers(storage) == [4, 5, 6]
    assert costs[0] == costs[1] == costs[2], "each time one new version is read"
    assert costs[0] <= 8
    assert costs[3] == costs[4] == costs[5]


@pytest.mark.parametrize("backlog", [10, 60])
def test_a_review_of_many_reads_the_newest_only(tmp_path: Path, backlog: int) -> None:
    storage = open_storage(tmp_path)
    for number in range(1, backlog):
        storage.put(f"adapters/{name(number)}/{MANIFEST}", b"never read")
    assert publish_to(storage, "run7") == name(backlog)
    before = storage.traffic
    fates = review_versions(storage, 1)
    assert sum(not fate.keep for fate in fates) == backlog - 1
    assert (storage.traffic - before).requests <= 8


def test_a_deletion_that_a_kill_cut_short(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for number in (1, 2, 3):
        publish_to(storage, "run7")
        if number > 1:
            take_lease(storage, name(number), "replica-1", 60)
        storage.rename_dir(version_dir("run7", number), trash_path(version_dir("run7", number)))
    publish_to(storage, "run7")
    storage.put(f"{version_dir('run7', 3)}/{MANIFEST}", b"somebody put it back already")
    storage.put("adapters/.trash-notes/x", b"mine")
    put_back_trash(storage)
    assert [entry.name for entry in storage.list("adapters") if entry.is_dir] == [
        ".trash-notes",
        f".trash-{name(3)}",
        *map(name, (2, 3, 4)),
    ]
    assert numbers(storage) == [2, 4]


def test_the_next_trainer_settles_it(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    publish_to(storage, "run7")
    take_lease(storage, name(1), "replica-1", 60)
    storage.rename_dir(version_dir("run7", 1), trash_path(version_dir("run7", 1)))
    Keeper(storage, Retention(), "run7").sweep(1, "nonce")
    assert numbers(storage) == [1]


class Sleeper:
    """A store whose caller sleeps between its look for a number and the claim of one."""

    def __init__(self, inner: Storage, meanwhile: Any) -> None:
        self._inner = inner
        self._meanwhile = meanwhile

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._inner, attribute)

    def put_new(self, path: str, data: bytes) -> None:
        if self._meanwhile is not None and path.endswith(".claim.json"):
            meanwhile, self._meanwhile = self._meanwhile, None
            meanwhile()
        self._inner.put_new(path, data)


def test_a_number_that_came_and_went_is_not_given_out_again(storage: Storage) -> None:
    """While a publisher sleeps, others publish its number and prune it with its claim."""
    publish_to(storage, "run7")

    def meanwhile() -> None:
        for _ in range(4):
            publish_to(storage, "run7")
        prune(storage, 2)
        assert numbers(storage) == [4, 5]
        assert not storage.exists(claim_path("run7", 2))

    assert publish_to(Sleeper(storage, meanwhile), "run7") == name(6)
    assert numbers(storage) == [4, 5, 6]
    assert not storage.exists(claim_path("run7", 2))
