"""Sampling from a replica: token ids in, token ids and their log-probabilities out.

Text plays no part: a text that is tokenized again may be other tokens than the ones that were
sampled. Every setting by which an engine may change the distribution is sent, since what it takes
for a default comes from a file beside the model (``generation_config.json``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from ckpt.errors import ConfigError

from .engine import Engine

Finish: TypeAlias = Literal["stop", "length"]

_FINISHES: Final[dict[Any, Finish]] = {"stop": "stop", "length": "length"}
_SEED_MAX: Final = 2**63 - 1
_PLAIN: Final = {
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""What leaves the distribution as the model gives it; both engines spell these alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample.

    Attributes:
        n: completions of the prompt.
        max_tokens: longest completion, in tokens.
        temperature: divides the logits; above 0.
        seed: of the first completion, the others take the following ones. SGLang heeds it only
            when started with ``--enable-deterministic-inference``.
        stop_token_ids: end a completion and belong to it; without any, all completions have
            ``max_tokens`` tokens. An engine may know further ones of the model's.
    """

    n: int = 1
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges (:class:`~ckpt.errors.ConfigError`)."""
        if self.n < 1 or self.max_tokens < 1 or not 0 < self.temperature < math.inf:
            msg = (
                "want n >= 1, max_tokens >= 1 and a temperature above 0, got "
                f"n={self.n}, max_tokens={self.max_tokens}, temperature={self.temperature}"
            )
            raise ConfigError(msg)
        if not 0 <= self.seed <= _SEED_MAX:
            msg = f"seed must be from 0 to {_SEED_MAX}, got {self.seed}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Generated:
    """One completion.

    Attributes:
        token_ids: what was sampled, at least one token.
        logprobs: its log-probabilities in nats, one a token, as the engine reports them. SGLang's
            are those of the distribution that was sampled from; vLLM's only with
            ``--logprobs-mode processed_logprobs``, else they are those at temperature 1.
        finish: ``stop``: it ended itself; ``length``: it was cut off.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish


@runtime_checkable
class Generator(Engine, Protocol):
    """An engine that can be sampled from."""

    def generate(
        self, token_ids: Sequence[int], adapter: str | None, sampling: Sampling
    ) -> list[Generated]:
        """Sample completions of one prompt.

        Args:
            token_ids: the prompt.
            adapter: name of a loaded adapter, or None for the base model.
            sampling: how.

        Returns:
            ``sampling.n`` completions.

        Raises:
            EngineUnreachable: no answer in time.
            EngineError: an answer that is no success, such as for an adapter that is not loaded, or
                one that is not of this prompt, this adapter and this many completions.
        """
        ...


def vllm_request(model: str, token_ids: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    """Body for ``POST /v1/completions``; the engine derives the seeds of the completions itself."""
    return {
        "model": model,
        "prompt": list(token_ids),
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
        "top_k": 0,
        # The sampled token's own, and none beside it.
        "logprobs": 0,
        "return_token_ids": True,
        **_PLAIN,
    }


def read_vllm(
    answer: Any, model: str, token_ids: Sequence[int], sampling: Sampling
) -> list[Generated]:
    """Completions from vLLM's answer.

    Raises:
        KeyError, TypeError, ValueError: it is not an answer to this request.
    """
    if answer["model"] != model:
        msg = f"the answer is of {answer['model']!r}"
        raise ValueError(msg)
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    for choice in choices:
        if choice["prompt_token_ids"] != list(token_ids):
            raise ValueError("the answer is to another prompt")
    found = [
        _generated(c["token_ids"], c["logprobs"]["token_logprobs"], c["finish_reason"], sampling)
        for c in choices
    ]
    return _whole(found, sampling)


def sglang_request(
    adapter: str | None, token_ids: Sequence[int], sampling: Sampling
) -> dict[str, Any]:
    """Body for ``POST /generate``: one entry a completion, each with a seed of its own."""
    entry = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
        "top_k": -1,
        **_PLAIN,
    }
    seeds = [(sampling.seed + index) & _SEED_MAX for index in range(sampling.n)]
    body: dict[str, Any] = {
        "input_ids": [list(token_ids)] * sampling.n,
        "sampling_params": [{**entry, "sampling_seed": seed} for seed in seeds],
        "return_logprob": True,
        # Only the completion's.
        "logprob_start_len": -1,
    }
    if adapter is not None:
        body["lora_path"] = [adapter] * sampling.n
    return body


def read_sglang(answer: Any, token_ids: Sequence[int], sampling: Sampling) -> list[Generated]:
    """Completions from SGLang's answer.

    Raises:
        KeyError, TypeError, ValueError: it is not an answer to this request.
    """
    found = []
    for entry in answer:
        meta = entry["meta_info"]
        if meta["prompt_tokens"] != len(token_ids):
            raise ValueError("the answer is to another prompt")
        pairs = meta["output_token_logprobs"]
        ids, logprobs = [pair[1] for pair in pairs], [pair[0] for pair in pairs]
        found.append(_generated(ids, logprobs, meta["finish_reason"]["type"], sampling))
    return _whole(found, sampling)


def _generated(ids: Any, logprobs: Any, finish: Any, sampling: Sampling) -> Generated:
    if not 1 <= len(ids) == len(logprobs) <= sampling.max_tokens:
        msg = f"{len(ids)} tokens with {len(logprobs)} log-probabilities"
        raise ValueError(msg)
    values = tuple(float(value) for value in logprobs)
    if any(type(item) is not int or item < 0 for item in ids) or not all(
        map(math.isfinite, values)
    ):
        raise ValueError("a token or log-probability that is none")
    return Generated(tuple(ids), values, _FINISHES[finish])


def _whole(found: list[Generated], sampling: Sampling) -> list[Generated]:
    if len(found) != sampling.n:
        msg = f"{len(found)} completions instead of {sampling.n}"
        raise ValueError(msg)
    return found
