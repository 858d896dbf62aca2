"""A program's group of commands, whose wrong usage is one line like every other error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperGroup

from .cli_console import USAGE, write_line

INTERRUPTED: Final = 130
"""What a shell reports for a process that Ctrl-C ended."""

JSON_ASKED: Final = "ckpt.json"
"""In a context's ``meta``: whether ``--json`` is among the arguments."""

_CLICK_ERRORS: Final[tuple[type[Exception], ...]] = tuple(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)
"""Of click's, or of the copy that typer has had since 0.28."""


class Group(TyperGroup):
    """Commands of one program.

    Typer draws a box of several lines around wrong usage, whatever reads it. Here it is one line
    that names the command whose ``--help`` says more; with ``--json`` a document as well.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Parse and run; ends the process unless ``standalone_mode`` is off."""
        name = prog_name or self.name
        given = list(sys.argv[1:] if args is None else args)
        if not standalone_mode:
            return super().main(given, name, complete_var, False, windows_expand_args, **extra)
        try:
            status = super().main(given, name, complete_var, False, windows_expand_args, **extra)
        except _CLICK_ERRORS as error:
            self._refuse(error, as_json=wants_json(given))
            status = USAGE
        sys.exit(status if isinstance(status, int) else 0)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note for the group's own callback what the command after it will be asked for."""
        ctx.meta[JSON_ASKED] = wants_json(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C, of which typer says nothing, is told like an error."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            self.complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None

    def complain(self, message: str) -> None:
        """One line on standard error."""
        sys.stderr.write(f"{self.name}: {message}\n")

    def _refuse(self, error: Any, *, as_json: bool) -> None:
        if type(error).__name__ == "NoArgsIsHelpError":
            return  # the help was printed, which is what is missing
        message = " ".join(error.format_message().split()).rstrip(".")
        context = getattr(error, "ctx", None)
        path = self.name if context is None else context.command_path
        message = f"{message}; `{path} --help` says what there is"
        if as_json:
            write_line({"error": {"type": "UsageError", "message": message}})
        self.complain(message)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON, be it understood otherwise or not."""
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before
