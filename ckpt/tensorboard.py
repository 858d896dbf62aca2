"""What saves cost, in TensorBoard, for ``CheckpointManager(on_metrics=...)``.

TensorBoard is asked for when the reporter is made, and not before.
"""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike, fspath
from typing import Any, Final

from .errors import ConfigError
from .types import SaveMetrics

_LEFT_OUT: Final = ("step", "extra", "planned", "skipped")


class TensorBoardReporter:
    """Writes the metrics of every save as scalars ``ckpt/stall_ms``, ``ckpt/total_ms`` and so on.

    Every rank that has one writes its own numbers: give it to rank 0 alone, or each rank another
    directory. A publish without a step is drawn at the step of the last save that had one.

    Args:
        log_dir: directory of the event files. Or
        writer: a ``SummaryWriter`` of the caller's, which is flushed but never closed.
        prefix: what the scalars' names begin with.

    Raises:
        ConfigError: neither or both are given, or TensorBoard is not installed.
    """

    def __init__(
        self,
        log_dir: str | PathLike[str] | None = None,
        *,
        writer: Any = None,
        prefix: str = "ckpt",
    ) -> None:
        if (log_dir is None) == (writer is None):
            raise ConfigError("a TensorBoardReporter takes a log_dir, or a writer, and not both")
        if log_dir is not None:
            writer = _summary_writer()(fspath(log_dir))
        self._writer = writer
        self._prefix = prefix
        self._step = 0

    def __call__(self, metrics: SaveMetrics) -> None:
        """Write one save's numbers; None is left out."""
        if metrics.step is not None:
            self._step = metrics.step
        numbers = {name: value for name, value in asdict(metrics).items() if name not in _LEFT_OUT}
        numbers |= {"planned": float(metrics.planned), "skipped": float(metrics.skipped)}
        for name, value in (numbers | metrics.extra).items():
            if value is not None:
                self._writer.add_scalar(f"{self._prefix}/{name}", value, self._step)
        self._writer.flush()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        msg = (
            f"TensorBoard cannot be used ({error}); install it with "
            "`pip install 'archon-lora[tensorboard]'`, or leave the reporter out"
        )
        raise ConfigError(msg) from error
    return SummaryWriter
