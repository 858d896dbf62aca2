"""What can be asked of a service: each question once, for the sync and the async client.

A :class:`Call` says what is sent and what comes back; who sends it is not its concern.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import msgspec

from ckpt.errors import DamagedError
from ckpt.wire import (
    API,
    ExportList,
    Health,
    JobList,
    JobRow,
    LeaseList,
    LeaseRow,
    PinList,
    PinRow,
    RunList,
    RunRow,
    StepDetail,
    StepList,
    VersionDetail,
    VersionList,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One question.

    Attributes:
        method: of HTTP.
        path: below the service's address.
        what: is asked for, for messages.
        answer: what comes back; None where the answer may have no body.
        params: of the query.
        json: the body.
        wait_s: seconds for which the service is asked to wait.
        repeat: whether it may be asked twice when an answer is lost.
    """

    method: str
    path: str
    what: str
    answer: type[T]
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    wait_s: float = 0.0
    repeat: bool = True

    def decode(self, content: bytes) -> T:
        """The answer's body as what it is.

        Raises:
            DamagedError: it is not.
        """
        try:
            return msgspec.json.decode(content, type=self.answer)
        except msgspec.MsgspecError as error:
            raise DamagedError(f"{self.what}: not an answer of this API: {error}") from error


def _query(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def ready() -> Call[Health]:
    """Whether every root answers."""
    return Call("GET", "/readyz", "readiness", Health)


def runs() -> Call[RunList]:
    """The roots that are served."""
    return Call("GET", f"{API}/runs", "runs", RunList)


def run(name: str) -> Call[RunRow]:
    """One root."""
    return Call("GET", f"{API}/runs/{name}", f"run {name}", RunRow)


def steps(name: str, before: str | None, limit: int) -> Call[StepList]:
    """A page of steps, newest first."""
    params = _query(before=before, limit=limit)
    return Call("GET", f"{API}/runs/{name}/steps", f"steps of {name}", StepList, params)


def step(name: str, number: int | None, epoch: int | None) -> Call[StepDetail]:
    """One step, or the newest whole one."""
    place = "latest-step" if number is None else f"steps/{number}"
    params = _query(epoch=epoch)
    return Call("GET", f"{API}/runs/{name}/{place}", f"step of {name}", StepDetail, params)


def versions(name: str, run_name: str | None, before: str | None, limit: int) -> Call[VersionList]:
    """A page of versions, newest first."""
    params = _query(run_name=run_name, before=before, limit=limit)
    path = f"{API}/runs/{name}/versions"
    return Call("GET", path, f"versions of {name}", VersionList, params)


def version(name: str, version_name: str) -> Call[VersionDetail]:
    """One committed version."""
    path = f"{API}/runs/{name}/versions/{version_name}"
    return Call("GET", path, f"version {version_name}", VersionDetail)


def latest(name: str, run_name: str | None) -> Call[VersionDetail]:
    """The newest whole version."""
    path = f"{API}/runs/{name}/latest"
    return Call("GET", path, f"newest version of {name}", VersionDetail, _query(run_name=run_name))


def wait(
    name: str, newer_than: str | int | None, run_name: str | None, timeout_s: float
) -> Call[VersionDetail]:
    """The newest version above another, or no body once the time is over."""
    params = _query(newer_than=newer_than, run_name=run_name, timeout_s=f"{timeout_s:.3f}")
    path = f"{API}/runs/{name}/wait"
    return Call("GET", path, f"versions of {name}", VersionDetail, params, wait_s=timeout_s)


def leases(name: str, version_name: str | None) -> Call[LeaseList]:
    """Who uses a version, or all of them."""
    place = "" if version_name is None else f"/versions/{version_name}"
    return Call("GET", f"{API}/runs/{name}{place}/leases", f"leases of {name}", LeaseList)


def lease(name: str, version_name: str, holder: str, ttl_s: float) -> Call[LeaseRow]:
    """Take or renew a lease."""
    path = f"{API}/runs/{name}/versions/{version_name}/leases/{holder}"
    return Call("PUT", path, f"lease of {version_name}", LeaseRow, json={"ttl_s": ttl_s})


def release(name: str, version_name: str, holder: str) -> Call[None]:
    """Give a lease back."""
    path = f"{API}/runs/{name}/versions/{version_name}/leases/{holder}"
    return Call("DELETE", path, f"lease of {version_name}", type(None))


def pins(name: str) -> Call[PinList]:
    """What is pinned."""
    return Call("GET", f"{API}/runs/{name}/pins", f"pins of {name}", PinList)


def pin(name: str, target: str, note: str) -> Call[PinRow]:
    """Pin a step or version."""
    path = f"{API}/runs/{name}/pins/{target}"
    return Call("PUT", path, f"pin of {target}", PinRow, json={"note": note})


def unpin(name: str, target: str) -> Call[None]:
    """Take a pin away."""
    return Call("DELETE", f"{API}/runs/{name}/pins/{target}", f"pin of {target}", type(None))


def start_job(name: str, body: Mapping[str, Any]) -> Call[JobRow]:
    """Ask for a job: once, for a second one would be another job."""
    params = {key: value for key, value in body.items() if value is not None}
    path = f"{API}/runs/{name}/jobs"
    return Call("POST", path, f"job of {name}", JobRow, json=params, repeat=False)


def jobs(name: str, limit: int) -> Call[JobList]:
    """The newest jobs, without their results."""
    return Call("GET", f"{API}/runs/{name}/jobs", f"jobs of {name}", JobList, _query(limit=limit))


def job(name: str, job_id: str) -> Call[JobRow]:
    """One job."""
    return Call("GET", f"{API}/runs/{name}/jobs/{job_id}", f"job {job_id}", JobRow)


def cancel_job(name: str, job_id: str) -> Call[JobRow]:
    """Ask for a job to be let be."""
    return Call("POST", f"{API}/runs/{name}/jobs/{job_id}/cancel", f"job {job_id}", JobRow)


def exports(name: str) -> Call[ExportList]:
    """Adapters that jobs exported."""
    return Call("GET", f"{API}/runs/{name}/exports", f"exports of {name}", ExportList)
