"""prime-rl's step directories: ``step_<N>/trainer`` is stock DCP, with the ranks' data positions.

The names in it begin with ``app.``: ``app.model``, ``app.optimizers``, ``app.scheduler`` and
``app.progress``; ``dataloader/rank_<R>.pt`` lies beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from ckpt.dcp.importing import Imported, import_stock
from ckpt.dcp.mapping import Choices
from ckpt.dcp.stock import METADATA, StockCheckpoint
from ckpt.errors import NoCheckpoint, StateError
from ckpt.foreign import seeded_rng
from ckpt.storage import open_storage

from .torch_file import TorchFile

_TRAINER: Final = "trainer"
_APP: Final = "app"
_DATALOADER: Final = re.compile(r"rank_(\d+)\.pt")
_STEP: Final = re.compile(r"step_(\d+)")


def find_prime_rl(directory: Path) -> Path | None:
    """The trainer's part of a step directory (or itself), if it is one of prime-rl's."""
    for path in (directory, directory / _TRAINER):
        if (path / METADATA).is_file() and (
            path.name == _TRAINER or (path / "dataloader").is_dir()
        ):
            return path
    return None


class _AppCheckpoint(StockCheckpoint):
    """The same checkpoint without the ``app.`` before its names."""

    def __init__(self, path: Path) -> None:
        super().__init__(open_storage(path))
        head = f"{_APP}."
        strange = sorted(n for n in {*self.tensors, *self.entries} if not n.startswith(head))
        if strange:
            msg = (
                f"{path} is not laid out as prime-rl does it: {strange[0]!r} is not below {_APP!r}"
            )
            raise StateError(msg)
        self.tensors = {name.removeprefix(head): value for name, value in self.tensors.items()}
        self.entries = {name.removeprefix(head): value for name, value in self.entries.items()}
        self.paths = {
            name.removeprefix(head): where[1:] if where[:1] == (_APP,) else where
            for name, where in self.paths.items()
        }


def import_prime_rl(
    trainer: Path,
    root: str,
    *,
    step: int | None = None,
    optimizer: str | None = None,
    skip: tuple[str, ...] = (),
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """Convert a step of prime-rl into the first step of a run.

    ``progress`` goes into ``extra``; the ranks' data positions are their ``dataloader``. Random
    states were not saved: they begin from seed 0.

    Args:
        trainer: what :func:`find_prime_rl` found.
        root: root of the run; it must not hold steps.
        step: number that the step gets; prime-rl's own by default.
        optimizer: class name of the optimizer, or None to tell it from the groups.
        skip: names (without ``app.``) that are left out.
        storage_options: for the root's store.

    Raises:
        CkptError: as :func:`ckpt.dcp.importing.import_checkpoint`.
        NoCheckpoint: the data position of a rank is missing.
        StateError: a class in a data position that is not read here, by name.
    """
    stock = _AppCheckpoint(trainer)
    choices = Choices("model", "optimizers", optimizer, skip)
    if not any(name.startswith("optimizers.") for name in (*stock.tensors, *stock.entries)):
        choices = Choices("model", None, optimizer, skip)
    ranks = _ranks(trainer / "dataloader")
    numbers = [m[1] for part in trainer.absolute().parts if (m := _STEP.fullmatch(part))]
    number = int(numbers[-1]) if numbers else 0
    return import_stock(
        stock,
        root,
        number if step is None else step,
        choices,
        ranks=ranks,
        storage_options=storage_options,
    )


def _ranks(folder: Path) -> list[dict[str, Any]]:
    """Each rank's data position, by rank; empty where none was saved."""
    if not folder.is_dir():
        return []
    files = {int(m[1]): p for p in folder.iterdir() if (m := _DATALOADER.fullmatch(p.name))}
    missing = sorted(set(range(len(files))) - files.keys())
    if missing:
        raise NoCheckpoint(f"{folder}: rank_{missing[0]}.pt is missing")
    ranks = []
    for rank in range(len(files)):
        file = TorchFile(files[rank])
        try:
            position = file.plain(file.value, "the data position")
        finally:
            file.close()
        ranks.append({"rng": seeded_rng(), "dataloader": position, "per_rank": {}})
    return ranks
