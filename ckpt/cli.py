"""The ``ckpt`` command's entry point.

The commands need typer and rich, which come with the extra ``[cli]``; without them the answer is
one line that says so.
"""

from __future__ import annotations

import sys

_EXTRA = frozenset({"typer", "rich"})


def main() -> None:
    """Run the command line and exit with its status."""
    try:
        from .cli_commands import run
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        sys.stderr.write(
            f"ckpt: the command line needs {missing}: pip install 'archon-lora[cli]'\n"
        )
        sys.exit(2)
    except KeyboardInterrupt:  # loading takes seconds, in which a typo is noticed
        sys.stderr.write("ckpt: interrupted\n")
        sys.exit(130)
    sys.exit(run())


if __name__ == "__main__":
    main()
