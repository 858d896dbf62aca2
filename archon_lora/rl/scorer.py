"""The model as an inference engine serves it: whole, in the engine's dtype, adapter folded.

The trainer's own shards differ from that in two roundings: the base may have another dtype, and
the adapter has not been rounded to the dtype in which it is published. Here both are done, so that
what an engine answers can be compared with what it should answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archon_lora.adapter import adapters_disabled
from archon_lora.engine.inference import next_token_logprobs
from archon_lora.peft import load_adapter_tensors


class Scorer:
    """Computes log-probabilities under the adapter last loaded, or under the base.

    Attributes:
        prompt: token ids of the probe.
        loaded: what :meth:`load` was told the adapter is; None before.
    """

    def __init__(self, model: nn.Module, *, prompt: tuple[int, ...]) -> None:
        """Take over a plain (unsharded) model with an adapter applied.

        Args:
            model: maps tokens ``[B, S]`` to logits ``[B, S, V]``.
            prompt: token ids of the probe.
        """
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._device = next(model.parameters()).device
        # The trainer's thread records probes, the rollout thread checks samples.
        self._lock = threading.Lock()
        self._base: tuple[float, ...] | None = None
        self.prompt = prompt
        self.loaded: str | None = None

    @property
    def dtype(self) -> str:
        """In which it computes, e.g. ``"bfloat16"``."""
        return str(next(self._model.parameters()).dtype).removeprefix("torch.")

    def load(
        self, name: str, peft_config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> None:
        """Take an adapter in its published form.

        Args:
            name: what it is called, for :attr:`loaded`.
            peft_config: content of ``adapter_config.json``.
            tensors: by PEFT key.

        Raises:
            AdapterMismatch: it does not fit the model.
        """
        with self._lock:
            self.loaded = None
            load_adapter_tensors(self._model, tensors, peft_config)
            self.loaded = name

    @torch.no_grad()
    def logprobs(
        self, token_ids: Sequence[int], *, temperature: float = 1.0, adapter: bool = True
    ) -> list[float]:
        """Log-probabilities of tokens 1 to n-1, each given the ones before it, in nats.

        Args:
            token_ids: at least two.
            temperature: divides the logits.
            adapter: False computes the base alone.
        """
        ids_BS = torch.tensor([list(token_ids)], dtype=torch.int64)
        with self._lock:
            if adapter:
                logits_BSV = self._model(ids_BS.to(self._device))
            else:
                with adapters_disabled(self._model):
                    logits_BSV = self._model(ids_BS.to(self._device))
        found: list[float] = next_token_logprobs(logits_BSV, ids_BS, temperature)[0].tolist()
        return found

    def answer(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The probe's log-probabilities under the adapter, and under the base."""
        if self._base is None:  # the base never changes
            self._base = tuple(self.logprobs(self.prompt, adapter=False))
        return tuple(self.logprobs(self.prompt)), self._base
