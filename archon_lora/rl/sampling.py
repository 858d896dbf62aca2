"""Sampling completions on this rank alone, the same tokens on any number of ranks.

Sample number ``i`` of the batch for step ``t`` draws its random numbers from a generator seeded
by (seed, t, i) and nothing else: which rank computes it, and beside which others, plays no part.

Shape suffixes: B rows of one length, S prompt tokens, T new tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archon_lora.adapter import get_adapter_params
from archon_lora.errors import AdapterMismatch
from archon_lora.models.cache import KVCache


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled completion: its token ids and their log-probabilities (fp32 values)."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def sample_seed(seed: int, step: int, sample: int) -> int:
    """The 63-bit seed of one sample's generator."""
    digest = hashlib.sha256(f"{seed}:{step}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``count`` float64 draws from [0, 1) per seed, ``[len(seeds), count]``."""
    rows = [
        torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for seed in seeds
    ]
    return torch.stack(rows)


class LocalPolicy:
    """A whole model on this rank's device that samples with the adapter last loaded."""

    def __init__(
        self, model: nn.Module, *, stop_ids: Collection[int], temperature: float, max_new: int
    ) -> None:
        """Take over a plain (unsharded) model with its adapter applied.

        Args:
            model: maps tokens ``[B, S]`` to logits ``[B, S, V]`` and takes ``cache=``.
            stop_ids: token ids that end a completion; the id itself belongs to it.
            temperature: divides the logits.
            max_new: longest completion in tokens.
        """
        self._model = model.eval().requires_grad_(requires_grad=False)
        self._params = get_adapter_params(model)
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._temperature = temperature
        self._max_new = max_new

    @torch.no_grad()
    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy a full adapter (canonical FQN to tensor) into the model.

        Raises:
            AdapterMismatch: the names are not exactly those of the model.
        """
        if tensors.keys() != self._params.keys():
            odd = sorted(tensors.keys() ^ self._params.keys())
            msg = f"the rollout model and the trainer disagree on adapter tensors: {odd[:4]}"
            raise AdapterMismatch(msg)
        for name, param in self._params.items():
            param.copy_(tensors[name])

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        """Sample one completion per prompt.

        Prompts of one length run as one batch, so that no row is ever padded.
        """
        done: dict[int, Completion] = {}
        by_length: dict[int, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(row)
        for rows in by_length.values():
            found = self._complete_batch(
                torch.tensor([list(prompts[row]) for row in rows], dtype=torch.int64),
                uniforms([seeds[row] for row in rows], self._max_new),
            )
            done.update(zip(rows, found, strict=True))
        return [done[row] for row in range(len(prompts))]

    def _complete_batch(self, prompts_BS: Tensor, draws_BT: Tensor) -> list[Completion]:
        """Sample token by token over a KV cache until every row has stopped."""
        device = next(self._model.parameters()).device
        cache = KVCache(prompts_BS.shape[1] + self._max_new)
        stopped = torch.zeros(prompts_BS.shape[0], dtype=torch.bool)
        lengths = torch.full((prompts_BS.shape[0],), self._max_new)
        tokens: list[Tensor] = []
        logprobs: list[Tensor] = []
        new = prompts_BS
        for position in range(self._max_new):
            logits = self._model(new.to(device), cache=cache)[:, -1].float().cpu()
            logp_BV = torch.log_softmax(logits / self._temperature, dim=-1)
            new = _inverse_cdf(logp_BV, draws_BT[:, position : position + 1])
            tokens.append(new)
            logprobs.append(logp_BV.gather(1, new))
            ends = torch.isin(new[:, 0], self._stop_ids) & ~stopped
            lengths[ends] = position + 1
            stopped |= ends
            if bool(stopped.all()):
                break
        all_tokens = torch.cat(tokens, dim=1).tolist()
        all_logprobs = torch.cat(logprobs, dim=1).tolist()
        return [
            Completion(tokens=tuple(ids[:size]), logprobs=tuple(lps[:size]))
            for ids, lps, size in zip(all_tokens, all_logprobs, lengths.tolist(), strict=True)
        ]


def _inverse_cdf(logp_BV: Tensor, draw_B1: Tensor) -> Tensor:
    """Token ids ``[B, 1]`` where the cumulative probability first exceeds the draw."""
    cdf = logp_BV.double().exp().cumsum(dim=-1)
    # The sum is 1 only up to rounding; scaling the draw keeps the last token reachable and no
    # index past it.
    index = torch.searchsorted(cdf, draw_B1 * cdf[:, -1:], right=True)
    return index.clamp_(max=logp_BV.shape[-1] - 1)
