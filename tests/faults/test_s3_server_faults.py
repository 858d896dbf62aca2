"""A trainer whose S3 server fails it: by a proxy before moto, or before the server that is named.

After every fault the run is whole: what a restore gives was saved, is the newest step that
counts, and every byte on the server verifies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from support.fake_s3 import Spoil
from support.fault_proxy import FaultProxy, fault_proxy
from support.s3_server import S3Server, named_server
from support.tiny_run import Run

from ckpt import CheckpointManager, CkptError
from ckpt.catalog import check_step, list_steps
from ckpt.storage import open_storage
from ckpt.versions import list_versions, read_version

pytestmark = pytest.mark.s3

RETRY = {"attempts": 3, "base": 0.01, "cap": 0.05, "seconds": 5.0, "bytes_per_second": 1e8}
DONE, FAILED, EITHER = "done", "failed", "either"
SLOW, ERROR = (503, "SlowDown"), (500, "InternalError")


@dataclass(frozen=True)
class Fault:
    """What goes wrong while step 1 is saved and published, and how that must end."""

    ends: str
    spoils: tuple[Spoil, ...]
    parts: bool = field(default=False, kw_only=True)


MANIFEST = {"method": "PUT", "key": "step-00000001.w0002/MANIFEST"}
SHARD = {"key": "/shard-00000"}
FAULTS = {
    "503 bursts": Fault(DONE, tuple(Spoil(m, "status", SLOW, times=2) for m in ("PUT", "GET"))),
    "500 bursts": Fault(DONE, tuple(Spoil(m, "status", ERROR, times=2) for m in ("PUT", "GET"))),
    "manifest: yes, lost": Fault(DONE, (Spoil(how="drop-after", **MANIFEST),)),
    "manifest: yes, then 500": Fault(DONE, (Spoil(how="status-after", **MANIFEST),)),
    "manifest: conflict": Fault(
        DONE, (Spoil(how="status", code=(409, "ConditionalRequestConflict"), times=2, **MANIFEST),)
    ),
    "manifest: never answered, but there": Fault(
        EITHER,
        (
            Spoil(how="drop-after", **MANIFEST),
            Spoil(how="drop", times=99, **MANIFEST),
            Spoil("GET", "drop", key=MANIFEST["key"], times=99),
        ),
    ),
    "manifest: never answered, not there": Fault(
        FAILED, (Spoil(how="drop", times=99, **MANIFEST),)
    ),
    "manifest: denied": Fault(
        FAILED, (Spoil(how="status", code=(403, "AccessDenied"), times=99, **MANIFEST),)
    ),
    "shard: closed": Fault(DONE, (Spoil("PUT", "drop", times=2, **SHARD),)),
    "shard: never through": Fault(FAILED, (Spoil("PUT", "status", SLOW, times=99, **SHARD),)),
    "shard: stalled": Fault(FAILED, (Spoil("PUT", "hang", seconds=7.0, times=99, **SHARD),)),
    "part: denied": Fault(
        FAILED,
        (Spoil("PUT", "status", (403, "AccessDenied"), query="partNumber", **SHARD),),
        parts=True,
    ),
    "parts: joined, answer lost": Fault(
        DONE, (Spoil("POST", "drop-after", query="uploadId=", **SHARD),), parts=True
    ),
    "parts: an error that comes as a 200": Fault(
        DONE, (Spoil("POST", "status", (200, "InternalError"), query="uploadId=", **SHARD),),
        parts=True,
    ),
    "parts: a yes, and nothing there": Fault(
        FAILED, (Spoil("POST", "lie", query="uploadId=", times=99, **SHARD),), parts=True
    ),
}  # fmt: skip


BACKENDS = ("s3fs", "obstore")
SAMPLE = {
    ("503 bursts", "s3fs"),
    ("manifest: yes, lost", "s3fs"),
    ("manifest: never answered, but there", "obstore"),
    ("shard: closed", "obstore"),
    ("parts: a yes, and nothing there", "s3fs"),
}
"""What runs before moto; everything runs before a server that the environment names."""
SAVES = [
    (name, backend)
    for name in FAULTS
    for backend in BACKENDS
    if named_server() or (name, backend) in SAMPLE
]
RESTORES = [
    (how, backend)
    for how in ("status", "drop", "truncate", "flip")
    for backend in BACKENDS
    if named_server() or (how, backend) in {("flip", "s3fs"), ("truncate", "obstore")}
]


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with contextlib.closing(s3.client()) as client, fault_proxy(s3.endpoint_url) as between:
        between.remove = lambda key: client.delete_object(Bucket=s3.bucket, Key=key)
        yield between


def saved(url: str, options: dict, run: Run, steps: range) -> list[str]:
    """Train, save and publish; what was raised."""
    raised = []
    manager = CheckpointManager(url, storage_options=options, vote_timeout=60)
    manager.restore(run.state)
    for step in steps:
        run.step()
        try:
            manager.save(step, run.state, publish=True).wait()
        except CkptError as error:
            raised.append(f"{type(error).__name__}: {error}")
    try:
        manager.close()
    except CkptError as error:
        raised.append(f"{type(error).__name__}: {error}")
    return raised


def restored(url: str, options: dict) -> tuple[int | None, dict[str, str], list]:
    run = Run(seed=99)
    with CheckpointManager(url, storage_options=options) as manager:
        step = manager.restore(run.state)
        assert manager.last_restore is not None
        return step, run.digest(), list(manager.last_restore.damaged)


def verify(url: str, options: dict) -> None:
    """Every byte of every committed step and version."""
    storage = open_storage(url, options)
    for entry in list_steps(storage):
        if entry.manifest is not None:
            assert list(check_step(storage, entry)) == []
    for version in list_versions(storage):
        if version.state != "claimed":
            read_version(storage, version.name)
    storage.close()


@pytest.mark.parametrize(("name", "backend"), SAVES)
def test_a_save(
    s3: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, name: str, backend: str
) -> None:
    fault = FAULTS[name]
    if fault.parts:
        monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 200)
    url = s3.url("run")
    options = s3.options_for(backend)
    run = Run()
    assert saved(url, options, run, range(1)) == []
    digests = {0: run.digest()}
    proxy.spoils = [replace(spoil) for spoil in fault.spoils]  # they are used up
    raised = saved(url, {**options, "endpoint_url": proxy.url, "retry": RETRY}, run, range(1, 2))
    digests[1] = run.digest()
    met = [spoil for spoil, plan in zip(proxy.spoils, fault.spoils, strict=True)
           if spoil.times < plan.times]  # fmt: skip
    assert met, "the fault was never met"
    step, digest, damaged = restored(url, options)
    assert step in digests
    assert digest == digests[step]
    assert damaged == []
    assert bool(raised) == (fault.ends == FAILED) or fault.ends == EITHER
    assert step == (0 if fault.ends == FAILED else 1)
    verify(url, options)


@pytest.mark.parametrize(("how", "backend"), RESTORES)
def test_a_restore(s3: S3Server, proxy: FaultProxy, how: str, backend: str) -> None:
    """Broken answers are asked for again, and so is what arrives with a flipped bit."""
    url = s3.url("run")
    options = s3.options_for(backend)
    run = Run()
    assert saved(url, options, run, range(2)) == []
    spoil = Spoil("GET", how, SLOW, times=2 if how != "flip" else 1, key="/shard-00000")
    proxy.spoils = [spoil]
    step, digest, damaged = restored(url, {**options, "endpoint_url": proxy.url, "retry": RETRY})
    assert spoil.times == 0
    assert (step, damaged) == (1, [])
    assert digest == run.digest()
    verify(url, options)
