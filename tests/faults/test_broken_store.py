"""An object store that fails in the middle of a save or a restore, once or for good.

The ranks are real processes with short time limits; the server is told what to do wrong.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from support.fake_s3 import FakeS3, Spoil, fake_s3
from support.fault_cells import NEWEST, Field, Planted, Tally, run_trainer

pytestmark = [pytest.mark.dist, pytest.mark.s3]

FOR_GOOD = 10_000


@dataclass(frozen=True)
class FakeServer:
    """The fake as the grounds know a server."""

    fake: FakeS3

    @property
    def storage_options(self) -> dict[str, str]:
        return {"endpoint_url": self.fake.url, "key": "k", "secret": "s"}

    def url(self) -> str:
        return f"s3://bucket/{uuid.uuid4().hex}"


@pytest.fixture
def fake() -> Iterator[FakeS3]:
    with fake_s3() as fake:
        yield fake


@pytest.fixture
def field(
    fake: FakeS3, tally: Tally, plants: dict[str, Planted], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Field]:
    """Grounds on the fake server."""
    for name, value in {
        "ACCESS_KEY_ID": "k",
        "SECRET_ACCESS_KEY": "s",
        "DEFAULT_REGION": "r",
    }.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    field = Field(lambda: FakeServer(fake), tally, plants)
    yield field
    field.close()


# Which requests: (flavour, method, text in the key, text in the query).
SAVES = {
    "put of a shard": ("s3", "PUT", "/shard-00001", ""),
    "put of the state": ("s3", "PUT", "/state.json", ""),
    "create of the manifest": ("s3", "PUT", "step-00000002.w0002/MANIFEST", ""),
    "claim of the epoch": ("s3", "PUT", "writers/", ""),
    "probe of the store": ("s3", "PUT", "/.probe-", ""),
    "claim of the version": ("s3", "PUT", ".claim.json", ""),
    "put of the adapter": ("s3", "PUT", "adapter_model", ""),
    "listing": ("s3", "GET", "", "list-type"),
    "start of a multipart": ("s3-parts", "POST", "/shard-00001", "uploads"),
    "part": ("s3-parts", "PUT", "/shard-00001", "partNumber"),
    "end of a multipart": ("s3-parts", "POST", "/shard-00001", "uploadId"),
}
RESTORES = {
    "listing": ("s3", "GET", "", "list-type"),
    "read of the writer's record": ("s3", "GET", "writers/0001", ""),
    "look at the manifest": ("s3", "HEAD", "step-00000001.w0001/MANIFEST", ""),
    "read of the manifest": ("s3", "GET", "step-00000001.w0001/MANIFEST", ""),
    "look at a shard": ("s3", "HEAD", "/shard-00001", ""),
    "read of a shard": ("s3", "GET", "/shard-00001", ""),
    "read of the state": ("s3", "GET", "/state.json", ""),
}
HOW = {
    "500": {"how": "status", "code": (500, "InternalError")},
    "503": {"how": "status", "code": (503, "SlowDown")},
    "500 though it is done": {"how": "status-after", "code": (500, "InternalError")},
    "no answer though it is done": {"how": "drop-after"},
    "closed": {"how": "drop"},
    "reset in the body": {"how": "reset"},
    "stalled": {"how": "hang", "seconds": 6.0},
}
CELLS = [(request, how, times) for request in SAVES for how in HOW for times in ("once", "always")]
RESTORE_CELLS = [
    (request, how, times)
    for request, (_flavour, method, _key, _query) in RESTORES.items()
    for how in HOW
    for times in ("once", "always")
    # What only reads is done when it is answered, and the answer to a HEAD has no body to break.
    if "done" not in how and (method, how) != ("HEAD", "reset in the body")
]


def spoil(table: dict[str, tuple[str, str, str, str]], request: str, how: str, times: str) -> Spoil:
    _flavour, method, key, query = table[request]
    count = 1 if times == "once" else FOR_GOOD
    return Spoil(method=method, key=key, query=query, times=count, **HOW[how])


@pytest.mark.cells(4)
@pytest.mark.parametrize(("request_", "how", "times"), CELLS)
def test_a_request_of_a_save_fails(
    field: Field, fake: FakeS3, request_: str, how: str, times: str
) -> None:
    """Once: nobody notices. For good: everybody is told; what is committed stays and is whole."""
    ground = field.ground(SAVES[request_][0])
    fake.spoils.append(spoil(SAVES, request_, how, times))
    seen = run_trainer(ground.script(deadline=30.0))
    assert fake.spoils[0].times < FOR_GOOD
    assert fake.spoils.pop().times != 1, "the fault was never met"
    committed = max(ground.committed())[0]
    if times == "once":
        assert [rank.errors for rank in seen] == [[], []]
        assert committed == NEWEST + 1
    for rank in seen:
        if committed == NEWEST:
            assert rank.committed == []
            assert rank.errors, "a rank was told nothing"
        elif not rank.errors:
            assert rank.committed == [NEWEST + 1]
    ground.go_on(committed)


@pytest.mark.cells(3)
@pytest.mark.parametrize(("request_", "how", "times"), RESTORE_CELLS)
def test_a_request_of_a_restore_fails(
    field: Field, fake: FakeS3, request_: str, how: str, times: str
) -> None:
    """Once: nobody notices. For good: an error, never an older step in silence."""
    ground = field.ground(RESTORES[request_][0])
    fake.spoils.append(spoil(RESTORES, request_, how, times))
    seen = run_trainer(ground.script(saves=(), deadline=30.0))
    assert fake.spoils.pop().times not in {1, FOR_GOOD}, "the fault was never met"
    for rank, one in enumerate(seen):
        if times == "once":
            assert one.errors == []
            assert one.damaged == []
            if rank == 0:
                ground.judge(one.start, one.digest, NEWEST)
        else:
            assert one.errors, f"rank {rank} restored step {one.start} and was told nothing"
            ground.tally.refusals += 1
    ground.go_on(NEWEST)


@pytest.mark.cells(1)
@pytest.mark.parametrize("request_", ["end of a multipart", "put of a shard", "put of the state"])
def test_the_store_says_done_and_loses_it(field: Field, fake: FakeS3, request_: str) -> None:
    """A success that was a lie is found out before the commit, or at the latest by the restore."""
    flavour, method, key, query = SAVES[request_]
    ground = field.ground(flavour)
    fake.spoils.append(Spoil(method=method, how="lie", key=key, query=query, times=FOR_GOOD))
    seen = run_trainer(ground.script())
    assert fake.spoils.pop().times < FOR_GOOD
    assert max(ground.committed())[0] == NEWEST
    for rank in seen:
        assert rank.committed == []
        assert rank.errors
    ground.go_on(NEWEST)


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "request_", ["read of the manifest", "read of a shard", "read of the state"]
)
@pytest.mark.parametrize("times", ["once", "always"])
def test_an_answer_has_a_flipped_bit(field: Field, fake: FakeS3, request_: str, times: str) -> None:
    """What arrives damaged is not used: the step is read again or passed over with a message."""
    _flavour, method, key, query = RESTORES[request_]
    ground = field.ground("s3")
    count = 1 if times == "once" else FOR_GOOD
    fake.spoils.append(Spoil(method=method, how="flip", key=key, query=query, times=count))
    for rank, one in enumerate(run_trainer(ground.script(saves=()))):
        if one.errors:
            ground.tally.refusals += 1
            continue
        if rank == 0:
            ground.judge(one.start, one.digest)
        assert one.start == NEWEST or one.damaged, "an older step in silence"
    fake.spoils.clear()
    ground.go_on(NEWEST)
