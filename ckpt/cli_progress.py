"""What a command shows while it works: a bar on a terminal's standard error, elsewhere nothing.

Standard output is never touched, so that it can be piped while the bar is seen. Where a function
takes no callback, the meters of the stores that it works on are read whenever the bar is drawn.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from .storage import Storage, Traffic

_NOT_DRAWN: Final = frozenset({"dumb", "unknown"})


class Advance(Protocol):
    """Takes note of bytes that were moved, and of how many there are if that is known only now."""

    def __call__(self, count: int, total: int | None = None) -> None:
        """Move the bar on."""
        ...


class _Amount(ProgressColumn):
    """Bytes, of how many if that is known, and requests if they are counted."""

    def render(self, task: Task) -> Text:
        """The text beside the bar."""
        text = decimal(int(task.completed))
        if task.total is not None:
            text += f" of {decimal(int(task.total))}"
        requests = task.fields.get("requests")
        if requests is not None:
            text += f", {requests} request{'s' * (requests != 1)}"
        return Text(text)


class _Bar(Progress):
    """A bar that looks at meters whenever it is drawn."""

    measure: Callable[[], None] | None = None

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn now."""
        if self.measure is not None:
            self.measure()
        yield from super().get_renderables()


def _bar(what: str) -> _Bar:
    return _Bar(
        TextColumn(what),
        BarColumn(),
        _Amount(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        # Output belongs where it was sent: a bar must not draw it to the other stream.
        redirect_stdout=False,
    )


def is_drawn(as_json: bool) -> bool:
    """Whether somebody sits there who may want to see a bar.

    ``FORCE_COLOR`` and the like ask for colours in files, not for moving pictures.
    """
    if as_json or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM", "").lower() not in _NOT_DRAWN


@contextlib.contextmanager
def progress(what: str, total: int | None = None, *, as_json: bool) -> Iterator[Advance]:
    """A bar that is moved by hand.

    Args:
        what: is going on.
        total: bytes in all, if that is known.
        as_json: JSON is printed, so that nobody watches.
    """
    if not is_drawn(as_json):
        yield lambda count, total=None: None
        return
    with _bar(what) as bar:
        task = bar.add_task(what, total=total)

        def advance(count: int, total: int | None = None) -> None:
            bar.update(task, advance=count, total=total)

        yield advance


@contextlib.contextmanager
def watching(
    what: str, *stores: Storage, total: int | None = None, as_json: bool
) -> Iterator[None]:
    """A bar of what stores move from now on.

    Args:
        what: is going on.
        stores: whose traffic counts; without any the bar shows the time alone.
        total: about so many bytes, if that is known.
        as_json: JSON is printed, so that nobody watches.
    """
    if not is_drawn(as_json):
        yield
        return
    before = [store.traffic for store in stores]
    total = total or None  # nothing to go by is no end that could be reached
    with _bar(what) as bar:
        task = bar.add_task(what, total=total, requests=0 if stores else None)

        def measure() -> None:
            moved = [store.traffic - old for store, old in zip(stores, before, strict=True)]
            count = sum(one.moved for one in moved)
            # Blocks are read whole, and some twice, so that the total is only about right.
            shown = count if total is None else min(count, total)
            bar.update(task, completed=shown, requests=_requests(moved))

        bar.measure = measure
        yield


def _requests(moved: list[Traffic]) -> int | None:
    return sum(one.requests for one in moved) if moved else None
