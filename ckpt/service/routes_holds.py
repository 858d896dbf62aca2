"""Operations of readers and people: leases, what sidecars say of their engines, pins."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request
from pydantic import BaseModel, ConfigDict, Field

from ckpt.errors import ConfigError, DamagedError, NoCheckpoint
from ckpt.handoff.replica_record import ReplicaRecord
from ckpt.holds import MAX_TTL_S, pin, pinned, read_pin, release_lease, take_lease, unpin
from ckpt.layout import replica_path
from ckpt.wire import API, LeaseRow, PinList, PinRow

from .answers import RESPONSES
from .auth import Needs, Scope
from .roots import ServedRoot
from .routes_runs import NAME, Root, VersionName
from .rows import lease_row, pin_row

Holder = Annotated[str, Path(pattern=NAME, description="Unique name of the reader.")]
PinName = Annotated[
    str,
    Path(
        pattern=r"^(step-[0-9]{8}\.w[0-9]{4}|[A-Za-z0-9][A-Za-z0-9_-]{0,90}-v[0-9]{8})$",
        description="Bare name of a step or version.",
    ),
]

router = APIRouter(prefix=API, tags=["holds"], responses=RESPONSES)
_LEASE = [Depends(Needs(Scope.lease))]
_ADMIN = [Depends(Needs(Scope.admin))]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class LeaseBody(_Strict):
    """How long a lease is to last, in seconds from now."""

    ttl_s: float = Field(gt=0, le=MAX_TTL_S)


class PinBody(_Strict):
    """Why something is pinned."""

    note: str = Field(default="", max_length=1000)


@router.put("/runs/{run}/versions/{version}/leases/{holder}", dependencies=_LEASE)
async def put_lease(root: Root, version: VersionName, holder: Holder, body: LeaseBody) -> LeaseRow:
    """Use a version from now on; again renews."""
    lease = await root.call(take_lease, root.storage, version, holder, body.ttl_s)
    return lease_row(lease, live=True)


@router.delete(
    "/runs/{run}/versions/{version}/leases/{holder}", dependencies=_LEASE, status_code=204
)
async def delete_lease(root: Root, version: VersionName, holder: Holder) -> None:
    """Stop using a version; one that is not held is fine."""
    await root.call(release_lease, root.storage, version, holder)


@router.put(
    "/runs/{run}/replicas/{holder}",
    dependencies=_LEASE,
    status_code=204,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"type": "object"}}},
        }
    },
)
async def put_replicas(request: Request, root: Root, holder: Holder) -> None:
    """Say what one's engines serve: a sealed record of the format `ckpt.replicas`."""
    body = await request.body()
    try:
        record = ReplicaRecord.from_bytes(body, "the record")
    except DamagedError as error:
        raise ConfigError(str(error)) from error
    if record.holder != holder:
        raise ConfigError(f"the record is that of another holder than {holder}")
    await root.call(root.storage.put, replica_path(holder), body)


@router.delete("/runs/{run}/replicas/{holder}", dependencies=_LEASE, status_code=204)
async def delete_replicas(root: Root, holder: Holder) -> None:
    """Take back what one said of one's engines; nothing said is fine."""
    await root.call(root.storage.delete, replica_path(holder))


@router.get("/runs/{run}/pins", dependencies=[Depends(Needs(Scope.read))])
async def list_pins(root: Root) -> PinList:
    """What is pinned, and why."""
    return await root.call(_pins, root)


def _pins(root: ServedRoot) -> PinList:
    found = (read_pin(root.storage, name) for name in sorted(pinned(root.storage)))
    return PinList(tuple(pin_row(record) for record in found if record is not None))


@router.put("/runs/{run}/pins/{name}", dependencies=_ADMIN)
async def put_pin(root: Root, name: PinName, body: PinBody) -> PinRow:
    """Keep a step or version whatever retention says, until it is unpinned."""
    return pin_row(await root.call(pin, root.storage, name, body.note))


@router.delete("/runs/{run}/pins/{name}", dependencies=_ADMIN, status_code=204)
async def delete_pin(root: Root, name: PinName) -> None:
    """Leave a step or version to retention again."""
    if not await root.call(unpin, root.storage, name):
        raise NoCheckpoint(f"{name} of {root.url} is not pinned")
