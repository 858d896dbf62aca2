"""The gate before a publish: no version may end a server that loads it by itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from ckpt.errors import ConfigError
from ckpt.peft_config import config_bytes
from ckpt.shard import LENGTH_BYTES

from .finding import Effect, Severity
from .run import lint_export
from .subject import VLLM_RANKS, LintLimits, TensorForm

log = logging.getLogger(__name__)

_LIMITS: Final = LintLimits(vllm_max_lora_rank=max(VLLM_RANKS))
"""How servers are started is not known here, so only what none could take is said."""


def check_publishable(header: bytes, config: Mapping[str, Any]) -> None:
    """Refuse an adapter for which an engine would die; log what single engines get wrong.

    Versions of a run differ in their values alone, so the answer is remembered: after the first,
    a publish pays for the hash of the header.

    Args:
        header: of the safetensors file that will be written, its length included.
        config: what ``adapter_config.json`` will hold.

    Raises:
        ConfigError: names the tensor, the engine and the remedy.
    """
    fatal = _judge(header, config_bytes(config))
    if fatal is not None:
        raise ConfigError(fatal)


@lru_cache(maxsize=16)
def _judge(header: bytes, config: bytes) -> str | None:
    """Why it may not be published, or None. What is not fatal is logged, here and so only once."""
    entries = json.loads(header[LENGTH_BYTES:])
    entries.pop("__metadata__", None)
    forms = {
        key: TensorForm(entry["dtype"], tuple(entry["shape"])) for key, entry in entries.items()
    }
    fatal = None
    for one in lint_export(json.loads(config), forms, limits=_LIMITS):
        if one.severity is not Severity.error:
            continue
        if one.effect is Effect.DIES:
            fatal = fatal or (
                f"{one.engine} would die of it ({one.code}): {one.message}; {one.remedy}"
            )
        else:
            what = f"{one.effect} by" if one.effect is Effect.REFUSED else f"{one.effect} in"
            log.warning(
                "the published adapter is %s %s (%s): %s; %s",
                what,
                one.engine,
                one.code,
                one.message,
                one.remedy,
            )
    return fatal
