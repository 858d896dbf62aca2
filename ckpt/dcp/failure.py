"""DCP's errors as ours.

Whatever goes wrong on any rank, DCP raises ``CheckpointException``, which ``except Exception``
does not catch: it is a ``BaseException``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from ckpt.errors import CkptError
from ckpt.vote import Failure


@contextmanager
def converted() -> Iterator[None]:
    """Around a call of DCP: what it raises as ``CheckpointException`` becomes a ``CkptError``.

    Raises:
        CkptError: the first failed rank's error; the other ranks' are its notes.
    """
    try:
        yield
    except CheckpointException as error:
        raise convert(error) from error


def convert(error: CheckpointException) -> CkptError:
    """The error of the first rank that failed, with the rank in its text.

    An error of ours keeps its class; any other is a :class:`CkptError` that names its class.
    """
    failures = sorted(error.failures.items())
    if not failures:
        return CkptError(str(error))
    rank, (cause, _trace) = failures[0]
    result = _rebuild(rank, cause)
    for other, (later, _trace) in failures[1:]:
        result.add_note(f"rank {other} failed too: {type(later).__name__}: {later}")
    return result


def _rebuild(rank: int, cause: BaseException) -> CkptError:
    if isinstance(cause, CkptError):
        return Failure.of(cause, rank).rebuild(keep=True)
    return CkptError(f"rank {rank}: {type(cause).__name__}: {cause}")
