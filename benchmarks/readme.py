"""The README quotes the results between two markers; this puts the newest ones there."""

from __future__ import annotations

import json
from pathlib import Path

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"


def quoted(results: Path) -> str:
    """The text that belongs between the markers.

    Args:
        results: ``results.json``.
    """
    found = json.loads(results.read_text(encoding="utf-8"))
    return f"{found['description']}\n\n{found['table']}\n"


def refresh(readme: Path, results: Path) -> bool:
    """Put the results into the README; returns whether that changed it.

    Raises:
        ValueError: the README does not have each marker once, in their order.
    """
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        msg = f"{readme} must hold {BEGIN} and then {END}, each once"
        raise ValueError(msg)
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    new = f"{head}{BEGIN}\n\n{quoted(results)}\n{END}{tail}"
    readme.write_text(new, encoding="utf-8")
    return new != text
