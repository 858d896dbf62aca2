"""A client of ``ckpt serve``: typed, sync and async, with deadlines and verified downloads.

For readers of versions, :class:`ckpt.handoff.Registry` takes a service's address like any other
root, and so do the commands. This client is for what a root alone cannot do: jobs, events, pages.
"""

from .async_client import AsyncClient
from .events import Event
from .sync_client import Client

__all__ = ["AsyncClient", "Client", "Event"]
