"""One optimizer step on one batch.

Shape suffixes: N rows of this rank, S tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from archon_lora.engine import ArchonEngine
from archon_lora.rl.config import TrainConfig
from archon_lora.rl.grpo import group_advantages, grpo_terms, token_logprobs
from archon_lora.rl.rollout import Batch, Sample, share


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step measured, over all ranks.

    Attributes:
        reward: mean over the samples.
        loss: mean over the completion tokens.
        kl: mean k3 estimate over the completion tokens.
        clip_fraction: share of tokens whose ratio left the interval.
        tokens: completion tokens trained on.
        grad_norm: before clipping.
        lr: learning rate of this update.
    """

    reward: float
    loss: float
    kl: float
    clip_fraction: float
    tokens: int
    grad_norm: float
    lr: float


def train_on(
    engine: ArchonEngine, batch: Batch, config: TrainConfig, *, group: dist.ProcessGroup | None
) -> StepResult:
    """Train on this rank's share of a whole batch; collective.

    Args:
        engine: an initialised engine with an optimizer.
        batch: all samples of the step.
        config: clip, KL weight, group size and temperature.
        group: ranks over which the measurements are summed.
    """
    rewards = torch.tensor([s.reward for s in batch.samples], dtype=torch.float64)
    advantages = group_advantages(
        rewards, config.rollout.group_size, config.grpo.advantage_eps
    ).float()
    # By rows, not by rank: ranks that share layers compute the same ones.
    mine = share(len(batch.samples), engine.dp_rank, engine.dp_size)
    rows = collate([batch.samples[i] for i in mine], advantages[mine.start : mine.stop])
    rows["reference"] = engine.logprobs(rows, reference=True).cpu()
    sums = torch.zeros(3, dtype=torch.float64)

    def loss_fn(logits_NSV: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        mask = part["completion"]
        terms = grpo_terms(
            logprobs=token_logprobs(
                logits_NSV[:, :-1], part["input_ids"][:, 1:], config.rollout.temperature
            ),
            behaviour=part["behaviour"],
            reference=part["reference"],
            advantages=part["advantages"],
            mask=mask,
            clip=config.grpo.clip,
            kl_coef=config.grpo.kl_coef,
        )
        tokens = mask.sum()
        sums.add_(torch.stack([terms.kl.double(), terms.clipped.double(), tokens.double()]).cpu())
        return terms.loss / tokens

    done = engine.train_batch(rows, loss_fn, loss_weight_fn=_completion_tokens)
    dist.all_reduce(sums, group=group)
    # Every row was counted by each of the ranks that compute it.
    kl, clipped, tokens = (sums * engine.dp_size / engine.world_size).tolist()
    return StepResult(
        reward=rewards.mean().item(),
        loss=done["loss"],
        kl=kl / tokens,
        clip_fraction=clipped / tokens,
        tokens=int(tokens),
        grad_norm=done["grad_norm"],
        lr=done["lr"],
    )


def _completion_tokens(part: Mapping[str, Tensor]) -> float:
    return float(part["completion"].sum())


def collate(samples: list[Sample], advantages: Tensor) -> dict[str, Tensor]:
    """Samples as one batch of rows, padded on the right.

    Attention is causal, so that padding after a row's end touches nothing that counts.

    Args:
        samples: at least one.
        advantages: fp32, one a sample.

    Returns:
        ``input_ids`` int64 ``[N, S]``; ``completion`` bool, ``behaviour`` fp32, both
        ``[N, S - 1]``, at the position that predicts the token; ``advantages`` fp32 ``[N]``.
    """
    width = max(len(s.prompt) + len(s.completion.tokens) for s in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    completion = torch.zeros(len(samples), width - 1, dtype=torch.bool)
    behaviour = torch.zeros(len(samples), width - 1, dtype=torch.float32)
    for row, sample in enumerate(samples):
        start = len(sample.prompt)
        end = start + len(sample.completion.tokens)
        ids[row, :end] = torch.tensor([*sample.prompt, *sample.completion.tokens])
        completion[row, start - 1 : end - 1] = True
        behaviour[row, start - 1 : end - 1] = torch.tensor(sample.completion.logprobs)
    return {
        "input_ids": ids,
        "completion": completion,
        "behaviour": behaviour,
        "advantages": advantages,
    }
