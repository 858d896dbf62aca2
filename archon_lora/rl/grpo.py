"""Group-relative policy optimisation: advantages, KL estimate and loss.

Sources: the group-normalised advantage and the clipped ratio with a KL penalty are those of
DeepSeekMath (arXiv 2402.03300, eq. 3-4); the KL estimate is the unbiased, non-negative "k3"
of J. Schulman's note on approximating KL; averaging over all tokens of the batch rather than
over each sequence first follows DAPO (arXiv 2503.14476).

Shape suffixes: N samples of a rank, S positions (tokens minus one), G group size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_size: int, eps: float) -> Tensor:
    """``(r - mean) / (std + eps)`` within each group.

    Args:
        rewards: float ``[groups * G]``, the samples of a group side by side.
        group_size: G, at least 2.
        eps: added to the (unbiased) standard deviation, so that a group of equal rewards
            gives zeros.

    Returns:
        float ``[groups * G]``.

    Raises:
        ValueError: the rewards do not divide into groups.
    """
    if group_size < 2 or rewards.ndim != 1 or rewards.numel() % group_size:
        msg = f"rewards of shape {tuple(rewards.shape)} do not form groups of {group_size}"
        raise ValueError(msg)
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + eps)).reshape(-1)


def token_logprobs(logits_NSV: Tensor, targets_NS: Tensor, temperature: float) -> Tensor:
    """Log-probability of each target under ``softmax(logits / temperature)``, fp32 ``[N, S]``."""
    scaled = logits_NSV.float() / temperature
    chosen = scaled.gather(-1, targets_NS.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(dim=-1)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference): ``exp(d) - d - 1``, ``d = ref - policy``."""
    delta = reference - logprobs
    return delta.exp() - delta - 1.0


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over the tokens of one rank; divide by the batch's token count for means.

    Attributes:
        loss: what is minimised (policy term + ``kl_coef`` times KL); carries the gradient.
        kl: sum of the KL estimates, detached.
        clipped: number of tokens whose ratio left the interval, detached.
    """

    loss: Tensor
    kl: Tensor
    clipped: Tensor


def grpo_terms(
    *,
    logprobs: Tensor,
    behaviour: Tensor,
    reference: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float,
    kl_coef: float,
) -> LossTerms:
    """The clipped token-level objective, summed over the tokens where ``mask`` is set.

    Args:
        logprobs: fp32 ``[N, S]`` of the policy being trained; carries the gradient.
        behaviour: fp32 ``[N, S]`` of the policy that sampled the tokens.
        reference: fp32 ``[N, S]`` of what the policy is to stay near to.
        advantages: fp32 ``[N]``.
        mask: bool ``[N, S]``, True on completion tokens.
        clip: half-width of the interval around 1.
        kl_coef: weight of the KL estimate.
    """
    # Masked positions may hold anything. They are replaced before any arithmetic: a mask put on
    # a result still lets 0 * inf = NaN into the gradient.
    logprobs, behaviour, reference = (
        torch.where(mask, t, 0.0) for t in (logprobs, behaviour, reference)
    )
    ratio = (logprobs - behaviour).exp()
    bounded = ratio.clamp(1.0 - clip, 1.0 + clip)
    gain = torch.minimum(ratio * advantages.unsqueeze(1), bounded * advantages.unsqueeze(1))
    kl = kl_k3(logprobs, reference)
    policy = torch.where(mask, -gain, 0.0)
    outside = ((ratio - 1.0).abs() > clip) & mask
    return LossTerms(
        loss=(policy + kl_coef * kl).sum(),
        kl=kl.detach().sum(),
        clipped=outside.sum(),
    )
