"""A program: call entry points with arguments, one after another; print what each said.

Arguments: one JSON list of ``[module, word, ...]``. All run in one process, which is what makes
many of them cheap.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys

import torch  # noqa: F401 - what it has to say of its own comes before the commands'


class Ended(BaseException):
    """``os._exit`` was called."""


def end(status: int) -> None:
    raise Ended(status)


def call(module: str, words: list[str]) -> list[object]:
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [module, *words]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            importlib.import_module(module).main()
            status: object = 0
        except (SystemExit, Ended) as stop:
            status = 0 if stop.args in ((), (None,)) else stop.args[0]
    return [status, out.getvalue(), err.getvalue()]


os._exit = end  # type: ignore[assignment]  # a command ends its process at once after an error
json.dump([call(module, words) for module, *words in json.loads(sys.argv[1])], sys.__stdout__)
