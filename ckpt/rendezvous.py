"""How the ranks of one manager find each other: a TCPStore of their own.

The store's address travels once, over a gloo group that is made for that and used for nothing
else. After that no collective is ever run: training may use its groups as it likes.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import socket
import uuid
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# torch's own stubs leave the stores out of what the package exports.
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

from .errors import CkptError, ConfigError, SaveAborted
from .vote import NoteStore

logger = logging.getLogger(__name__)

_MESSAGE_BYTES = 1024
_LOOPBACK = "127.0.0.1"


@dataclass(slots=True)
class Ranks:
    """This process among the ranks that save together.

    Attributes:
        rank: this rank, counted inside the group.
        world: number of ranks.
        nonce: 24 hexadecimal digits that all ranks of this manager share and no other has.
        stores: two connections to the ranks' own store, one for the caller's thread and one for
            the background thread (a connection serves one request at a time).
        group: the gloo group that carried the address, if it is to be destroyed, or None.
    """

    rank: int
    world: int
    nonce: str
    stores: tuple[NoteStore, NoteStore]
    group: dist.ProcessGroup | None

    def release(self) -> None:
        """Give up the group; the store goes with the last reference to it."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None


def join(process_group: dist.ProcessGroup | None, timeout: float) -> Ranks:
    """Meet the other ranks; every rank of the group calls this once per manager.

    Args:
        process_group: whose ranks save together; the default group if None.
        timeout: seconds for the whole meeting.

    Raises:
        ConfigError: a process group is given, but torch.distributed is not initialised.
        SaveAborted: the store could not be set up or reached.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            msg = "process_group is given but torch.distributed is not initialised"
            raise ConfigError(msg)
        return _alone()
    members = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    if len(members) == 1:
        return _alone()
    rank = members.index(dist.get_rank())
    span = datetime.timedelta(seconds=timeout)
    part = len(members) < dist.get_world_size()
    group = dist.new_group(
        ranks=members,
        backend="gloo",
        timeout=span,
        # Only the members of a part of the world call this.
        use_local_synchronization=part,
    )
    message: dict[str, Any] = {}
    server: TCPStore | None = None
    if rank == 0:
        try:
            server = _serve(span)
            message = {"host": server.host, "port": server.port, "nonce": uuid.uuid4().hex[:24]}
        except (OSError, RuntimeError) as error:
            # The others wait for the message; they must hear of the failure, not time out.
            message = {"error": str(error)}
    message = _broadcast(message, members[0], group)
    if "error" in message:
        msg = f"rank 0 could not open the store for the ranks' votes: {message['error']}"
        raise SaveAborted(msg)
    try:
        first = server or _connect(message["host"], message["port"], span)
        stores = (first, _connect(message["host"], message["port"], span))
    except (OSError, RuntimeError) as error:
        msg = f"rank {rank} cannot reach rank 0's store at {message['host']}: {error}"
        raise SaveAborted(msg) from error
    # Such a group is named after its members. Were it destroyed, the next one of the same members
    # would get its name, and with it the addresses of closed sockets that it left in the store.
    return Ranks(rank, len(members), message["nonce"], stores, None if part else group)


def _alone() -> Ranks:
    store = HashStore()
    return Ranks(0, 1, uuid.uuid4().hex[:24], (store, store), None)


def _serve(timeout: datetime.timedelta) -> TCPStore:
    host, sock = _listen(os.environ.get("MASTER_ADDR", ""))
    port = sock.getsockname()[1]
    return TCPStore(
        host,
        port,
        None,
        True,
        timeout,
        wait_for_workers=False,
        # Our own socket, because the store would listen on every interface.
        master_listen_fd=sock.detach(),
    )


def _listen(master: str) -> tuple[str, socket.socket]:
    """A listening socket on the one address by which the other ranks reach this machine."""
    for host in _candidates(master):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.bind((host, 0))
            sock.listen(1024)
        except OSError as error:
            sock.close()
            logger.debug("cannot listen on %s: %s", host, error)
            continue
        return host, sock
    msg = f"no address of this machine can be bound (MASTER_ADDR is {master!r})"
    raise CkptError(msg)


def _candidates(master: str) -> list[str]:
    if not master:
        return [_LOOPBACK]
    infos = socket.getaddrinfo(master, 0, type=socket.SOCK_STREAM)
    found = [str(info[4][0]) for info in infos]
    # Rank 0 of a subgroup may live elsewhere than MASTER_ADDR: then the address from which this
    # machine would talk to it is the one the others can reach. No packet is sent by this.
    for info in infos:
        with socket.socket(info[0], socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((info[4][0], 9))
            except OSError:
                continue
            found.append(str(probe.getsockname()[0]))
    return list(dict.fromkeys(found))


def _connect(host: str, port: int, timeout: datetime.timedelta) -> TCPStore:
    return TCPStore(host, port, None, False, timeout, wait_for_workers=False)


def _broadcast(message: dict[str, Any], source: int, group: dist.ProcessGroup) -> dict[str, Any]:
    data = json.dumps(message).encode()[:_MESSAGE_BYTES]
    tensor = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    tensor[: len(data)].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    dist.broadcast(tensor, source, group=group)
    received: dict[str, Any] = json.loads(bytes(tensor.tolist()).rstrip(b"\0"))
    return received
