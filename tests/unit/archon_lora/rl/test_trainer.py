"""A training step against the formulas written out over a plain forward pass."""

import dataclasses

import pytest
import torch

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.build import build_engine, build_maker
from archon_lora.rl.config import parse_config
from archon_lora.rl.grpo import group_advantages
from archon_lora.rl.loop import process_group
from archon_lora.rl.rollout import Batch, Sample
from archon_lora.rl.sampling import Completion
from archon_lora.rl.trainer import collate, train_on


def sample(index, prompt, tokens, logprobs, reward=0.0):
    completion = Completion(tokens=tuple(tokens), logprobs=tuple(logprobs))
    return Sample(
        index=index, prompt=tuple(prompt), completion=completion, reward=reward, version=0
    )


def test_rows_are_padded_and_masks_sit_on_the_predicting_position():
    rows = collate(
        [sample(0, [5, 6], [7, 8, 9], [-1.0, -2.0, -3.0]), sample(1, [4], [3], [-0.5])],
        torch.tensor([1.0, -1.0]),
    )
    assert rows["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0]]
    assert rows["completion"].int().tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert rows["behaviour"].tolist() == [[0.0, -1.0, -2.0, -3.0], [-0.5, 0.0, 0.0, 0.0]]
    assert rows["advantages"].tolist() == [1.0, -1.0]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = write_tiny_qwen2(tmp_path_factory.mktemp("m") / "tiny", std=0.1)
    return parse_config({
        "model": {"path": str(model)},
        "checkpoint": {"root": "unused"},
        "rollout": {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 5,
                    "temperature": 0.9},
        "grpo": {"kl_coef": 0.5, "clip": 0.1},
        "optimizer": {"lr": 0.01, "warmup_steps": 0, "micro_batches": 2},
    })  # fmt: skip


def written_out(logits, base_logits, batch, config):
    """Mean loss and KL over the completion tokens, one token at a time."""
    rewards = torch.tensor([s.reward for s in batch.samples], dtype=torch.float64)
    advantages = group_advantages(rewards, 3, config.grpo.advantage_eps)
    total = kl_total = 0.0
    count = 0
    for row, s in enumerate(batch.samples):
        for at, (token, old) in enumerate(
            zip(s.completion.tokens, s.completion.logprobs, strict=True)
        ):
            where = len(s.prompt) + at - 1
            new = (logits[row, where].double() / 0.9).log_softmax(-1)[token]
            ref = (base_logits[row, where].double() / 0.9).log_softmax(-1)[token]
            ratio = (new - old).exp()
            gain = min(ratio * advantages[row], ratio.clamp(0.9, 1.1) * advantages[row])
            kl = (ref - new).exp() - (ref - new) - 1
            total += -gain + 0.5 * kl
            kl_total += kl
            count += 1
    return float(total / count), float(kl_total / count), count


def test_a_step_minimises_the_loss_that_the_formulas_give(config):
    with process_group(30):
        engine = build_engine(config)
        engine.initialize()
        maker = dataclasses.replace(build_maker(config, engine), indices=range(6))
        from archon_lora import get_adapter_state_dict

        generator = torch.Generator().manual_seed(3)
        adapter = {
            name: 0.2 * torch.randn(value.shape, generator=generator)
            for name, value in get_adapter_state_dict(engine.model, full=True).items()
        }
        made = maker.make(0, 0, 0, adapter)  # another policy than the engine's: ratios are not 1
        batch = Batch(
            step=0,
            first=0,
            samples=tuple(
                dataclasses.replace(s, reward=0.1 * i * i) for i, s in enumerate(made.samples)
            ),
        )
        rows = collate(list(batch.samples), torch.zeros(6))
        base = engine.forward(rows, reference=True)
        want_loss, want_kl, tokens = written_out(engine.forward(rows), base, batch, config)
        before = get_adapter_state_dict(engine.model, full=True)
        first = train_on(engine, batch, config, group=None)
        assert first.loss == pytest.approx(want_loss, rel=1e-4)
        assert first.kl == pytest.approx(want_kl, abs=1e-6)
        assert first.tokens == tokens == 30
        assert first.reward == pytest.approx(sum(0.1 * i * i for i in range(6)) / 6)
        assert first.clip_fraction > 0
        after = get_adapter_state_dict(engine.model, full=True)
        assert any(not torch.equal(before[name], after[name]) for name in before)
        want_loss, want_kl, _ = written_out(engine.forward(rows), base, batch, config)
        second = train_on(engine, batch, config, group=None)
        assert second.loss == pytest.approx(want_loss, rel=1e-4)
        assert second.kl == pytest.approx(want_kl, rel=1e-3)
        assert second.kl > 0, "after a step the policy differs from the base"
        engine.close()
