"""What the commands do where a root lies behind a service: work on it is the service's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from .errors import ConfigError, StateError
from .storage import Storage

if TYPE_CHECKING:
    from .storage.http_store import ServedStorage

_JOB_S: Final = 24 * 3600.0


def is_served(storage: Storage) -> TypeGuard[ServedStorage]:
    """Whether a root lies behind a service."""
    from .storage.base import Announcing

    return isinstance(storage, Announcing)


def served_prune(
    storage: ServedStorage, rules: Mapping[str, Any], *, dry_run: bool
) -> list[dict[str, Any]]:
    """Have a service prune its root: first a dry run, then what that showed, and nothing else.

    Args:
        storage: the root.
        rules: of the job, without those that are None.
        dry_run: only say what would go.

    Returns:
        A row for each step and version.

    Raises:
        CkptError: the one that the job failed with.
        ConfigError: what the client needs is not installed.
        StorageError: the service does not answer.
    """
    try:
        from .client import Client
    except ModuleNotFoundError as error:
        if error.name not in {"httpx", "msgspec"}:
            raise
        msg = f"pruning by a service needs {error.name}: pip install 'archon-lora[client]'"
        raise ConfigError(msg) from None
    client = Client.over(storage)
    shown = _result(client.wait_job(client.prune(**rules).id, timeout_s=_JOB_S))
    if dry_run or all(row["keep"] for row in shown["entries"]):
        return _rows(shown)
    job = client.prune(**rules, confirm=shown["plan"])
    return _rows(_result(client.wait_job(job.id, timeout_s=_JOB_S)))


def _rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key != "name"} for row in result["entries"]
    ]


def _result(job: Any) -> Mapping[str, Any]:
    if job.state == "succeeded" and job.result is not None:
        found: Mapping[str, Any] = job.result
        return found
    if job.error is not None and job.error.type == "ConfigError":
        raise ConfigError(job.error.message)
    reason = f"was {job.state}" if job.error is None else job.error.message
    raise StateError(f"job {job.id} of the service {reason}")
