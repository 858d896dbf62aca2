"""vLLM's door to a root: a plug-in that resolves ``<run>-v00000012`` by itself, verified.

vLLM calls :func:`register` in each of its processes, through the entry point
``vllm.general_plugins``; without ``CKPT_VLLM_ROOTS`` in the environment it does nothing. vLLM is
imported only there. The server asks a resolver for every model name that it does not know, so
names come from anybody who can send a request: what they may reach is in
:mod:`ckpt.handoff.resolve`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ckpt.errors import CkptError

from .resolve import Refused, ResolverSettings, VersionResolver

NAME: Final = "ckpt"
_THREADS: Final = 4
_SHOWN: Final = 120

log = logging.getLogger("vllm.plugins.ckpt")
"""Below vLLM's own logger, so that its handlers and levels apply."""


class ResolveFailed(RuntimeError):
    """A version could not be fetched for now; says nothing that the server's log does not."""


def register() -> None:
    """Register the resolver with vLLM, if the environment configures one.

    Raises:
        ConfigError: the environment configures it wrongly; the server does not start.
    """
    settings = ResolverSettings.from_environment(os.environ)
    if settings is None:
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    LoRAResolverRegistry.register_resolver(NAME, make_resolver(VersionResolver(settings)))


def make_resolver(versions: VersionResolver) -> Any:
    """A ``LoRAResolver`` of vLLM over ours (as vLLM 0.32 and later call it)."""
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver

    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ckpt-resolve")
    timeout_s = versions.settings.timeout_s

    class CkptResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not there to be checked
        """Resolves exact version names from configured roots."""

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            """The request for a version, or None if it is refused or is not there.

            Raises:
                ResolveFailed: the root or the cache failed, or took too long: try again.
            """
            reason = versions.refusal(lora_name)
            if reason is not None:
                log.warning("LoRA %s is refused: %s", _shown(lora_name), reason)
                return None
            loop = asyncio.get_running_loop()
            job = loop.run_in_executor(pool, versions.resolve, base_model_name, lora_name)
            try:
                # Shielded: a pull that takes too long for this request goes on for the next.
                path = await asyncio.wait_for(asyncio.shield(job), timeout_s)
            except Refused as refused:
                log.warning("LoRA %s is refused: %s", _shown(lora_name), refused)
                return None
            except TimeoutError as error:
                job.add_done_callback(_observe)
                log.warning("LoRA %s: no answer within %g s", _shown(lora_name), timeout_s)
                msg = f"{lora_name} is still being fetched; try again"
                raise ResolveFailed(msg) from error
            except CkptError as error:
                log.warning("LoRA %s cannot be fetched: %s", _shown(lora_name), error)
                msg = f"{lora_name} cannot be fetched now; the server's log says why"
                raise ResolveFailed(msg) from None
            log.info("LoRA %s lies verified in %s", lora_name, path)
            return LoRARequest(
                lora_name=lora_name, lora_int_id=stable_id(lora_name), lora_path=str(path)
            )

    return CkptResolver()


def stable_id(name: str) -> int:
    """A positive number that every process gives a name, and no other name in practice."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")


def _observe(job: asyncio.Future[Any]) -> None:
    """Say what became of a pull that nobody waits for any more."""
    if not job.cancelled() and job.exception() is not None:
        log.warning("a pull that took too long has failed: %s", job.exception())


def _shown(name: object) -> str:
    """A name from a request, fit for a line of the log."""
    text = ascii(name)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"
