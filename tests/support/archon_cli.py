"""``archon-lora`` called in this process, as its entry point calls it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch.distributed as dist

from archon_lora import cli

SECRET = "wJalrXUtnFEMI-K7MDENG"
"""A key that no output may show."""


class _Ended(Exception):
    pass


@dataclass(frozen=True)
class Told:
    """What a command left behind."""

    status: int
    out: str
    err: str

    def refused(self, status: int, *said: str) -> None:
        """One line on standard error, and the same as a document where JSON was asked for."""
        assert self.status == status, self.err
        (line,) = self.err.splitlines()
        assert line.startswith("archon-lora: ")
        for text in said:
            assert text in line
        assert SECRET not in self.err + self.out
        if self.out:
            error = json.loads(self.out)["error"]
            assert f"archon-lora: {error['message']}" == line


def caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Told]:
    """Calls the program with the given arguments; what it left behind."""

    def end(status: int) -> None:
        raise _Ended(status)

    def call(*args: object) -> Told:
        monkeypatch.setattr(sys, "argv", ["archon-lora", *map(str, args)])
        monkeypatch.setattr(os, "_exit", end)
        status: Any = 0
        try:
            cli.main()
        except _Ended as ended:
            status = ended.args[0]
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            # The command ends its process at once after an error; this one lives on.
            if dist.is_initialized():
                dist.destroy_process_group()
        output = capsys.readouterr()
        return Told(status, output.out, output.err)

    return call
