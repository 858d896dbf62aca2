"""Optimizer, schedule, RNG and version beside saved weights, as a resumable checkpoint.

Each save gets a root of its own, ``train_state/save-<number>``, in the format of :mod:`ckpt`. The
one before is deleted only when the new one is committed, and a load takes the highest number that
is, so a crash at any moment costs the new save and never the old one. For a save every few
steps, keep a :class:`ckpt.CheckpointManager` over ``engine.train_state()`` instead: it saves in the
background.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from ckpt import CheckpointManager
from ckpt.errors import NoCheckpoint, StateError
from ckpt.storage import open_storage

from .agree import agree, attempt, deadline_of, gather_json, rank_of

if TYPE_CHECKING:
    from .engine import ArchonEngine

FOLDER: Final = "train_state"
_NAME: Final = re.compile(r"save-(\d{6})")


def train_state_numbers(engine: ArchonEngine, path: str) -> list[int]:
    """Numbers of the saves below ``path``, oldest first, as the first rank sees them."""
    group, timeout = engine.cpu_group, deadline_of(engine)
    found: list[int] = []
    with attempt(group, what=f"listing {path}/{FOLDER}", timeout=timeout):
        if rank_of(group) == 0:
            entries = open_storage(path).list(FOLDER)
            matches = [_NAME.fullmatch(entry.name) for entry in entries if entry.is_dir]
            found = sorted(int(match[1]) for match in matches if match)
    numbers: list[int] = gather_json(group, found, timeout=timeout)[0]
    return numbers


def save_train_state(engine: ArchonEngine, path: str, *, with_optim: bool) -> None:
    """Commit the engine's state below ``path``; every rank must call. Returns when it is durable.

    Args:
        engine: its trainable weights, RNG and version are saved.
        path: the directory of the weights.
        with_optim: also the optimizer and the schedule.

    Raises:
        CkptError: why nothing was committed; an earlier save is still there then.
    """
    older = train_state_numbers(engine, path)
    root = _root(path, max(older, default=0) + 1)
    with CheckpointManager(root, process_group=engine.cpu_group, fresh=True) as manager:
        manager.save(0, engine.train_state(**_parts(with_optim=with_optim))).wait()
    error: Exception | None = None
    if rank_of(engine.cpu_group) == 0:
        try:
            for number in older:
                open_storage(path).delete_tree(f"{FOLDER}/save-{number:06}")
        except OSError as caught:
            error = caught
    what = f"deleting earlier saves below {path}/{FOLDER}"
    agree(engine.cpu_group, error, what=what, timeout=deadline_of(engine))


def load_train_state(engine: ArchonEngine, path: str, *, with_optim: bool) -> None:
    """Restore the newest committed save below ``path``, on any number of ranks.

    Args:
        engine: its weights, RNG and version are replaced.
        path: the directory of the weights.
        with_optim: also the optimizer and the schedule; must be as it was when saving.

    Raises:
        NoCheckpoint: there is none.
        StateError: it does not fit the engine, or only one of the two has an optimizer;
            nothing was touched.
    """
    for number in reversed(train_state_numbers(engine, path)):
        with CheckpointManager(_root(path, number), process_group=engine.cpu_group) as manager:
            state = engine.train_state(**_parts(with_optim=with_optim))
            try:
                restored = manager.restore(state)
            except StateError as error:
                msg = f"{error} (with_optim={with_optim} here must be as it was for save())"
                raise StateError(msg) from error
            if restored is not None:
                return
    msg = (
        f"no resumable checkpoint below {path}/{FOLDER}: it is written by save() with "
        "with_optim=True or weight_format='dcp'; load with with_optim=False to take the weights"
    )
    raise NoCheckpoint(msg)


def _root(path: str, number: int) -> str:
    return f"{path.rstrip('/')}/{FOLDER}/save-{number:06}"


def _parts(*, with_optim: bool) -> dict[str, Any]:
    return {} if with_optim else {"optimizer": None, "scheduler": None}
