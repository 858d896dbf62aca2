"""Which base model an engine runs, told from its directory, to compare with a version's record."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from ckpt.errors import BaseMismatch, ConfigError
from ckpt.types import BaseIdentity

_CONFIG: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
_VOLATILE: Final = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys of ``config.json`` that say how a model was saved or is run, not what it computes."""


def config_hash(directory: Path) -> str | None:
    """The hash that a trainer records as ``base.config_hash``, or None if there is no config.

    SHA-256 over ``config.json`` as canonical JSON (sorted keys, no spaces, ASCII) without null
    entries and without keys that differ between copies of one model.

    Raises:
        ConfigError: ``config.json`` is there and cannot be read as a JSON object.
    """
    path = directory / _CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            msg = f"{path} has more than {_MAX_CONFIG_BYTES} bytes, which no model's config has"
            raise ConfigError(msg)
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        msg = f"cannot read {path}: {error}"
        raise ConfigError(msg) from error
    if not isinstance(raw, dict):
        msg = f"{path} holds {type(raw).__name__}, want a JSON object"
        raise ConfigError(msg)
    kept = {key: value for key, value in raw.items() if value is not None and key not in _VOLATILE}
    canonical = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def check_base(name: str, wanted: BaseIdentity | None, served_hash: str | None) -> None:
    """Refuse an adapter of another base model, where both sides are known.

    Args:
        name: the version, for the message.
        wanted: the base model that the version was trained over, if it is recorded.
        served_hash: hash of the model that is served, if it is known.

    Raises:
        BaseMismatch: they differ.
    """
    if wanted is None or served_hash is None or wanted.config_hash == served_hash:
        return
    msg = (
        f"{name} was trained over {wanted.name!r} (config hash {wanted.config_hash[:12]}…), the "
        f"served model has config hash {served_hash[:12]}…; serve that base, or another run"
    )
    raise BaseMismatch(msg)
