"""``state.json`` of a checkpoint that DCP wrote: its non-tensor entries, as JSON.

The document decodes to ``{"dcp": {"entries": {name: value}, "planner_data": value}}``.
``planner_data`` is what the planner asks to have kept: with DCP's default planner the path of
every flattened name in the nested state dict.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ckpt.errors import DamagedError, StateError
from ckpt.state import SCHEMA, STATE_FORMAT, encode_state

_MEMBER = "dcp"


def encode_entry(name: str, value: Any) -> bytes:
    """A non-tensor entry as a state document of its own.

    Raises:
        StateError: it cannot be stored exactly; names the entry.
    """
    try:
        return encode_state(value)
    except StateError as error:
        msg = f"entry {name!r} of the state dict cannot be saved: {error}"
        raise StateError(msg) from None


def compose(entries: Mapping[str, bytes], planner_data: Any) -> bytes:
    """``state.json`` from entries that were encoded on their own.

    Raises:
        StateError: the planner's data cannot be stored.
    """
    try:
        encoded = encode_state(planner_data)
    except StateError as error:
        msg = f"the planner's own data cannot be saved: {error}"
        raise StateError(msg) from None
    # Pairs, because a name may be anything and an object's member may not; see ckpt.state.
    pairs = [[name, json.loads(data)["value"]] for name, data in sorted(entries.items())]
    value = {
        _MEMBER: {
            "entries": {"$": "dict", "v": pairs},
            "planner_data": json.loads(encoded)["value"],
        }
    }
    document = {"format": STATE_FORMAT, "schema": SCHEMA, "value": value}
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def is_dcp_state(value: Any) -> bool:
    """Whether a decoded ``state.json`` is one of a checkpoint that DCP wrote."""
    return isinstance(value, dict) and value.keys() == {_MEMBER}


def entries_of(value: Any, where: str) -> tuple[dict[str, Any], Any]:
    """(entries, planner data) of a decoded ``state.json``; both empty for a trainer's step.

    Raises:
        DamagedError: it has the member, but not its form.
    """
    if not is_dcp_state(value):
        return {}, None
    inner = value[_MEMBER]
    if not isinstance(inner, dict) or inner.keys() != {"entries", "planner_data"}:
        msg = f"{where}: the entries of a DCP checkpoint have another form"
        raise DamagedError(msg)
    entries = inner["entries"]
    if not isinstance(entries, dict) or not all(isinstance(name, str) for name in entries):
        msg = f"{where}: the entries of a DCP checkpoint are not named"
        raise DamagedError(msg)
    return entries, inner["planner_data"]
