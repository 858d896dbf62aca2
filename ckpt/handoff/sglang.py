"""An SGLang replica, over its own HTTP server.

The server must be started with ``--enable-lora``, ``--max-lora-rank`` and
``--lora-target-modules``; ``docs/engines.md`` has the whole command. What was seen of SGLang
0.5.23, and what follows:

- A load that answers 200 has looked at names and configuration only. Shapes are checked when a
  request first uses the adapter, and a wrong one ends the server: the probe may be the last thing
  that it is asked.
- A name that is on the list is refused with 400; there is no loading in place.
- Unloading takes the name off the list, then waits for the requests that use the adapter, and no
  other adapter is loaded meanwhile. It does not revoke the name: a request that
  still names it makes the server load the directory again, as it lies there then. So nothing asks
  under a name that was unloaded, and its directory is not touched while somebody may.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from .engine import AdapterRefused, EngineError, EngineKind, EngineUnreachable
from .generate import Generated, Sampling, read_sglang, sglang_request
from .http_engine import HttpEngine

UNLOAD_S: Final = 5.0
"""How long an unload is waited for; off the list, it goes on by itself once its requests end."""

_LINT: Final = "run `ckpt lint DIR --for sglang` on it and see the replica's log"


class SglangEngine(HttpEngine):
    """One SGLang server."""

    kind: EngineKind = "sglang"

    def load(self, name: str, path: str) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        what = f"load {name}"
        try:
            text = self._replica.change(
                "/load_lora_adapter", what, {"lora_name": name, "lora_path": path}
            )
        except EngineError as error:
            if error.status is None or error.status in (401, 403) or error.status >= 500:
                raise
            if "already loaded" in error.answer:
                remedy = "a name stands for one adapter; unload it, or publish the next version"
            elif "not enabled" in error.answer or error.status == 404:
                remedy = "start it with --enable-lora, as docs/engines.md says"
            else:
                remedy = _LINT
            raise self._replica.refused(error, what, remedy) from error
        if not _success(text):
            raise AdapterRefused(self.url, what, " ".join(text[:300].split()), _LINT, status=200)

    def unload(self, name: str) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        if name not in self.adapters():
            return
        timeout_s = min(UNLOAD_S, self._replica.timeout_s)
        try:
            self._replica.change(
                "/unload_lora_adapter", f"unload {name}", {"lora_name": name}, timeout_s
            )
        except EngineUnreachable:
            if name in self.adapters():
                raise

    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> list[float]:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        ids = list(token_ids)
        what = f"answer the probe under {adapter or 'the base model'}"
        body: dict[str, Any] = {
            "input_ids": ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        if adapter is not None:
            body["lora_path"] = adapter
        answer = self._replica.read("/generate", what, body)
        return self._replica.expect("/generate", what, lambda a: _prompt(a, ids), answer)

    def generate(
        self, token_ids: Sequence[int], adapter: str | None, sampling: Sampling
    ) -> list[Generated]:
        """See :class:`~ckpt.handoff.generate.Generator`."""
        what = f"sample under {adapter or 'the base model'}"
        body = sglang_request(adapter, token_ids, sampling)
        answer = self._replica.read("/generate", what, body)
        return self._replica.expect(
            "/generate", what, lambda a: read_sglang(a, token_ids, sampling), answer
        )

    def incarnation(self) -> str | None:
        """See :class:`~ckpt.handoff.engine.Engine`; from ``/server_info``.

        There is no time of the start in it, but how long each part of the start took, to the
        nanosecond, and a seed that is drawn at the start unless it was given.
        """
        try:
            answer = self._replica.read("/server_info", "when did it start?")
        except EngineError as error:
            if error.status == 404:
                return None
            raise
        told = answer if isinstance(answer, dict) else {}
        if told.get("startup_time") is None:
            return None
        marks = [told["startup_time"], told.get("random_seed")]
        return hashlib.sha256(json.dumps(marks, sort_keys=True).encode()).hexdigest()[:16]


def _success(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and answer.get("success") is True


def _prompt(answer: Any, ids: list[int]) -> list[float]:
    """The prompt's log-probabilities; the first token has none."""
    entries = answer["meta_info"]["input_token_logprobs"]
    if [entry[1] for entry in entries] != ids:
        raise ValueError(entries)
    return [float(entry[0]) for entry in entries[1:]]
