"""A vLLM replica, over its OpenAI-compatible server.

The server must be started with ``--enable-lora`` and the environment variable
``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``; ``docs/engines.md`` has the whole command. What was seen of
vLLM 0.32 and read in 0.33, and what follows:

- A load that answers 200 may have attached nothing (keys that match no module are passed over), and
  the name then serves the base: the answer to a load is never taken for a proof.
- A name that is on the list is refused with 400, whatever lies at its path now.
- A loader's error is 500 with every path masked; an adapter's own fault and a passing one look the
  same.
- Unloading takes the name off the list; the weights stay in the engine until others push them out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

from .engine import EngineError, EngineKind
from .generate import Generated, Sampling, read_vllm, vllm_request
from .http_engine import HttpEngine

_START: Final = re.compile(r"^process_start_time_seconds\s+(\S+)", re.MULTILINE)
_LINT: Final = "run `ckpt lint DIR --for vllm` on it and see the replica's log, which has the path"


class VllmEngine(HttpEngine):
    """One vLLM server."""

    kind: EngineKind = "vllm"

    def load(self, name: str, path: str) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        what = f"load {name}"
        body = {"lora_name": name, "lora_path": path, "load_inplace": False}
        try:
            self._replica.change("/v1/load_lora_adapter", what, body)
        except EngineError as error:
            if error.status == 404 and "adapter" not in error.answer.lower():
                remedy = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
                raise self._replica.refused(error, what, remedy) from error
            if error.status is None or error.status in (401, 403, 502, 503, 504):
                raise
            if "already been loaded" in error.answer:
                remedy = "a name stands for one adapter; unload it, or publish the next version"
                raise self._replica.refused(error, what, remedy) from error
            if error.status >= 500:
                raise EngineError(
                    self.url, what, error.answer, _LINT, status=error.status
                ) from error
            raise self._replica.refused(error, what, _LINT) from error

    def unload(self, name: str) -> None:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        try:
            self._replica.change("/v1/unload_lora_adapter", f"unload {name}", {"lora_name": name})
        except EngineError as error:
            if error.status not in (400, 404) or name in self.adapters():
                raise

    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> list[float]:
        """See :class:`~ckpt.handoff.engine.Engine`."""
        ids = list(token_ids)
        what = f"answer the probe under {adapter or 'the base model'}"
        body = {
            "model": adapter or self._base(),
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0.0,
            # The prompt's own tokens, and none beside them.
            "prompt_logprobs": 0,
        }
        answer = self._replica.read("/v1/completions", what, body)
        return self._replica.expect("/v1/completions", what, lambda a: _prompt(a, ids), answer)

    def generate(
        self, token_ids: Sequence[int], adapter: str | None, sampling: Sampling
    ) -> list[Generated]:
        """See :class:`~ckpt.handoff.generate.Generator`."""
        model = adapter or self._base()
        what = f"sample under {model}"
        body = vllm_request(model, token_ids, sampling)
        answer = self._replica.read("/v1/completions", what, body)
        return self._replica.expect(
            "/v1/completions", what, lambda a: read_vllm(a, model, token_ids, sampling), answer
        )

    def incarnation(self) -> str | None:
        """See :class:`~ckpt.handoff.engine.Engine`; the start of the process, from ``/metrics``."""
        try:
            found = _START.search(self._replica.read_text("/metrics", "when did it start?"))
        except EngineError as error:
            if error.status == 404:
                return None
            raise
        return None if found is None else found.group(1)

    def _base(self) -> str:
        if self._base_model is None:
            names = [card["id"] for card in self._cards() if not card.get("parent")]
            if not names:
                remedy = "give base_model"
                raise EngineError(self.url, "name its base model", "none is listed", remedy)
            self._base_model = names[0]
        return self._base_model


def _prompt(answer: Any, ids: list[int]) -> list[float]:
    """The prompt's log-probabilities; the first token has none."""
    entries = answer["choices"][0]["prompt_logprobs"]
    if len(entries) != len(ids):
        raise ValueError(len(entries))
    pairs = zip(ids[1:], entries[1:], strict=True)
    return [float(entry[str(token)]["logprob"]) for token, entry in pairs]
