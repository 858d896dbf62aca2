"""The loss against a plain-Python reference, number by number."""

import math

import pytest
import torch

from archon_lora.rl.grpo import group_advantages, grpo_terms, kl_k3, token_logprobs


def reference_advantages(rewards, size, eps):
    out = []
    for at in range(0, len(rewards), size):
        group = rewards[at : at + size]
        mean = sum(group) / size
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (size - 1))
        out += [(r - mean) / (std + eps) for r in group]
    return out


def reference_loss(new, old, ref, adv, mask, clip, kl_coef):
    loss = kl_sum = 0.0
    clipped = 0
    for n in range(len(new)):
        for s in range(len(new[n])):
            if not mask[n][s]:
                continue
            ratio = math.exp(new[n][s] - old[n][s])
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            delta = ref[n][s] - new[n][s]
            kl = math.exp(delta) - delta - 1
            loss += -min(ratio * adv[n], bounded * adv[n]) + kl_coef * kl
            kl_sum += kl
            clipped += abs(ratio - 1) > clip
    return loss, kl_sum, clipped


def test_advantages_match_the_reference():
    rewards = [0.0, 0.5, 1.0, 0.25, 0.75, 0.75]
    got = group_advantages(torch.tensor(rewards), 3, 1e-4)
    assert got.tolist() == pytest.approx(reference_advantages(rewards, 3, 1e-4), rel=1e-5)


def test_a_group_of_equal_rewards_teaches_nothing():
    assert group_advantages(torch.full((8,), 0.3), 4, 1e-4).tolist() == [0.0] * 8


@pytest.mark.parametrize("size", [1, 3])
def test_rewards_that_form_no_groups_are_refused(size):
    with pytest.raises(ValueError, match=f"do not form groups of {size}"):
        group_advantages(torch.zeros(4), size, 1e-4)


def example():
    generator = torch.Generator().manual_seed(5)
    new, old, ref = (-3 * torch.rand(3, 6, generator=generator) for _ in range(3))
    old = new + 0.5 * (torch.rand(3, 6, generator=generator) - 0.5)
    adv = torch.tensor([1.5, -0.75, 0.1])
    mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()
    return new, old, ref, adv, mask


def test_loss_kl_and_clip_count_match_the_reference():
    new, old, ref, adv, mask = example()
    terms = grpo_terms(
        logprobs=new, behaviour=old, reference=ref, advantages=adv, mask=mask, clip=0.1, kl_coef=0.3
    )
    want = reference_loss(
        *(t.double().tolist() for t in (new, old, ref, adv)), mask.tolist(), 0.1, 0.3
    )
    assert want[2] > 0, "the example must clip somewhere"
    assert terms.loss.item() == pytest.approx(want[0], rel=1e-5)
    assert terms.kl.item() == pytest.approx(want[1], rel=1e-5)
    assert terms.clipped.item() == want[2]


def test_masked_positions_reach_neither_loss_nor_gradient():
    new, old, ref, adv, mask = example()
    new = new.masked_fill(~mask, -math.inf).requires_grad_()
    old = old.masked_fill(~mask, math.nan)
    terms = grpo_terms(
        logprobs=new, behaviour=old, reference=ref, advantages=adv, mask=mask, clip=0.2, kl_coef=0.1
    )
    terms.loss.backward()
    assert torch.isfinite(terms.loss)
    assert torch.isfinite(new.grad).all()
    assert (new.grad[~mask] == 0).all()
    assert (new.grad[mask] != 0).any()


def test_a_good_token_beyond_the_interval_gets_no_more_push():
    new = torch.tensor([[0.0]], requires_grad=True)
    terms = grpo_terms(
        logprobs=new,
        behaviour=torch.tensor([[-1.0]]),
        reference=torch.tensor([[0.0]]),
        advantages=torch.tensor([1.0]),
        mask=torch.tensor([[True]]),
        clip=0.2,
        kl_coef=0.0,
    )
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-1.2)
    assert new.grad.item() == 0.0


def test_k3_is_zero_at_equality_and_positive_elsewhere():
    same = torch.tensor([-1.0, -2.0])
    assert kl_k3(same, same).tolist() == [0.0, 0.0]
    assert (kl_k3(same, same + torch.tensor([0.5, -0.5])) > 0).all()


def test_k3_is_an_unbiased_estimate_of_the_divergence():
    p = torch.tensor([0.5, 0.3, 0.2]).double()
    q = torch.tensor([0.2, 0.5, 0.3]).double()
    expected = (p * kl_k3(p.log(), q.log())).sum()
    assert expected.item() == pytest.approx((p * (p / q).log()).sum().item())


def test_token_logprobs_are_those_of_the_tempered_softmax():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    got = token_logprobs(logits.bfloat16(), targets, 0.7)
    want = torch.log_softmax(logits.bfloat16().float() / 0.7, -1).gather(2, targets[..., None])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want[..., 0])
