"""Rollouts: the same samples on any number of ranks, in order, and never too stale."""

import dataclasses
import math
import threading
from concurrent.futures import CancelledError
from functools import partial

import pytest
import torch
from tokenizers import Tokenizer

from archon_lora import LoRAConfig, apply_lora, get_adapter_state_dict
from archon_lora.errors import AdapterMismatch
from archon_lora.models import load_pretrained
from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.config import RolloutSection, TaskSection
from archon_lora.rl.rollout import (
    Batch,
    PromptStream,
    RolloutQueue,
    SampleMaker,
    merge,
    pack,
    share,
    unpack,
)
from archon_lora.rl.sampling import LocalPolicy, sample_seed, uniforms
from archon_lora.rl.task import make_task

SECTION = RolloutSection(prompts_per_step=3, group_size=4, max_new_tokens=9)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return write_tiny_qwen2(tmp_path_factory.mktemp("tiny"), std=0.1)


def make_policy(model_dir, *, stop_ids=(), max_new=9, temperature=1.0):
    model, names = load_pretrained(model_dir)
    apply_lora(model, LoRAConfig(rank=4, alpha=8), name_map=names.module_to_hf)
    return LocalPolicy(model, stop_ids=stop_ids, temperature=temperature, max_new=max_new), model


def some_adapter(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in get_adapter_state_dict(model, full=True).items()
    }


def make_maker(model_dir, indices):
    policy, model = make_policy(model_dir)
    maker = SampleMaker(
        policy=policy,
        tokenizer=Tokenizer.from_file(str(model_dir / "tokenizer.json")),
        task=make_task(TaskSection(length=9), seed=0),
        section=SECTION,
        seed=7,
        indices=indices,
    )
    return maker, model


@pytest.mark.parametrize("world", [1, 2, 3, 5, 12])
def test_shares_cover_every_sample_once(world):
    parts = [share(12, rank, world) for rank in range(world)]
    assert [i for part in parts for i in part] == list(range(12))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_samples_do_not_depend_on_the_number_of_ranks(model_dir):
    maker, model = make_maker(model_dir, range(12))
    adapter = some_adapter(model, 1)
    alone = maker.make(4, 3, 12, adapter)
    for world in (2, 5):
        parts = []
        for rank in range(world):
            part, _ = make_maker(model_dir, share(12, rank, world))
            parts.append(part.make(4, 3, 12, adapter))
        split = merge(parts)
        assert [s.completion.tokens for s in split.samples] == [
            s.completion.tokens for s in alone.samples
        ]
        assert [s.reward for s in split.samples] == [s.reward for s in alone.samples]
        for one, other in zip(alone.samples, split.samples, strict=True):
            assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-5)


def test_samples_depend_on_step_and_adapter(model_dir):
    maker, model = make_maker(model_dir, range(4))
    base = maker.make(4, 3, 0, some_adapter(model, 1))
    again = maker.make(4, 3, 0, some_adapter(model, 1))
    assert pack(base) | {"generate_ms": 0} == pack(again) | {"generate_ms": 0}
    for other in (
        maker.make(5, 4, 0, some_adapter(model, 1)),
        maker.make(4, 3, 0, some_adapter(model, 2)),
    ):
        assert [s.completion.tokens for s in other.samples] != [
            s.completion.tokens for s in base.samples
        ]


def test_prompts_follow_the_stream_and_groups_share_one(model_dir):
    maker, model = make_maker(model_dir, range(12))
    batch = maker.make(0, 0, 5, some_adapter(model, 1))
    texts = [maker.tokenizer.decode(list(s.prompt)) for s in batch.samples]
    want = [maker.task.question(5 + i // 4).prompt for i in range(12)]
    assert texts == want


def test_logprobs_are_those_of_a_whole_forward(model_dir):
    policy, model = make_policy(model_dir, temperature=0.8)
    policy.load_adapter(some_adapter(model, 3))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9, 8, 7]]
    found = policy.complete(prompts, seeds=[10, 11, 12])
    for prompt, completion in zip(prompts, found, strict=True):
        assert len(completion.tokens) == 9
        tokens = torch.tensor([[*prompt, *completion.tokens]])
        with torch.no_grad():
            logp = (model(tokens)[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        want = logp.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].tolist()
        assert completion.logprobs == pytest.approx(want, abs=2e-5)


def test_a_stop_token_ends_its_row_and_belongs_to_it(model_dir):
    free, _ = make_policy(model_dir)
    plain = free.complete([[1, 2, 3]] * 6, seeds=range(6))
    stop = plain[0].tokens[2]
    policy, _ = make_policy(model_dir, stop_ids=[stop])
    stopped = policy.complete([[1, 2, 3]] * 6, seeds=range(6))
    for before, after in zip(plain, stopped, strict=True):
        if stop in before.tokens:
            end = before.tokens.index(stop) + 1
            assert after.tokens == before.tokens[:end]
            assert len(after.logprobs) == end
        else:
            assert after.tokens == before.tokens
    assert any(len(c.tokens) < 9 for c in stopped)


def test_draws_follow_the_distribution(model_dir):
    policy, model = make_policy(model_dir, max_new=1)
    found = policy.complete([[1, 2, 3]] * 4000, seeds=range(4000))
    counts = torch.bincount(torch.tensor([c.tokens[0] for c in found]), minlength=97)
    with torch.no_grad():
        probs = model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1)
    expected = 4000 * probs
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(probs) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_seeds_are_distinct_and_draws_repeat():
    seeds = [sample_seed(0, step, i) for step in range(20) for i in range(20)]
    assert len(set(seeds)) == 400
    assert sample_seed(1, 0, 0) != sample_seed(0, 0, 0)
    assert torch.equal(uniforms([5, 6], 4)[1], uniforms([6], 4)[0])


def test_an_adapter_with_other_names_is_refused(model_dir):
    policy, model = make_policy(model_dir)
    tensors = some_adapter(model, 0)
    name, value = tensors.popitem()
    with pytest.raises(AdapterMismatch, match=r"disagree on adapter tensors"):
        policy.load_adapter(tensors)
    with pytest.raises(AdapterMismatch, match="stray"):
        policy.load_adapter({**tensors, name: value, "stray": value})


def test_packing_keeps_every_bit(model_dir):
    maker, model = make_maker(model_dir, range(12))
    batch = maker.make(4, 3, 12, some_adapter(model, 1))
    assert unpack(pack(batch)) == batch


def test_every_sample_says_which_policy_made_it_and_old_ones_are_counted(model_dir):
    maker, model = make_maker(model_dir, range(12))
    batch = maker.make(4, 3, 12, some_adapter(model, 1))
    assert {(s.version, s.made_by) for s in batch.samples} == {(3, "local")}
    older = dataclasses.replace(batch.samples[5], version=1)
    mixed = dataclasses.replace(batch, samples=(*batch.samples[:5], older, *batch.samples[6:]))
    assert mixed.version == 1
    assert [mixed.stale(4, bound) for bound in (0, 1, 2, 3)] == [12, 1, 1, 0]


def test_shares_of_different_batches_do_not_merge(model_dir):
    one = Batch(step=1, first=0, samples=())
    two = Batch(step=2, first=4, samples=())
    with pytest.raises(ValueError, match="do not make up one batch"):
        merge([one, two])
    maker, model = make_maker(model_dir, range(1, 3))
    part = maker.make(0, 0, 0, some_adapter(model, 1))
    with pytest.raises(ValueError, match="do not make up one batch"):
        merge([part])


def test_the_stream_goes_on_from_its_position():
    stream = PromptStream()
    assert [stream.draw(3), stream.draw(3)] == [0, 3]
    other = PromptStream()
    other.load_state_dict(stream.state_dict())
    assert other.draw(3) == 6


@pytest.fixture
def queue_of():
    queues = []

    def make(*, max_staleness=1, timeout=10.0):
        queues.append(RolloutQueue(max_staleness=max_staleness, timeout=timeout))
        return queues[-1]

    yield make
    for queue in queues:
        queue.close()


def echo(step):
    return Batch(step=step, first=0, samples=())


@pytest.mark.parametrize(("staleness", "step", "version"), [(0, 1, 0), (1, 5, 3), (2, 9, 10)])
def test_a_batch_outside_the_staleness_bound_is_refused(queue_of, staleness, step, version):
    queue = queue_of(max_staleness=staleness)
    with pytest.raises(ValueError, match=f"max_staleness is {staleness}"):
        queue.launch(step, version, partial(echo, step))
    assert queue.pending() == []


def test_the_worker_runs_beside_the_trainer_and_in_order(queue_of):
    gate = threading.Event()
    seen = []

    def make(step):
        assert gate.wait(10)
        seen.append((step, threading.current_thread().name))
        return echo(step)

    queue = queue_of(max_staleness=2)
    for step in (2, 3):
        queue.launch(step, step - 1, partial(make, step))
    assert queue.pending() == [2, 3]
    gate.set()
    assert queue.take(3).step == 3
    assert queue.take(2).step == 2
    assert [step for step, _ in seen] == [2, 3]
    assert all(name.startswith("rollout") for _, name in seen)


def test_a_failure_in_the_worker_reaches_the_trainer(queue_of):
    def make():
        raise RuntimeError("no more tokens")

    queue = queue_of()
    queue.launch(0, 0, make)
    with pytest.raises(RuntimeError, match="no more tokens"):
        queue.take(0)


def test_a_late_batch_is_an_error_and_closing_does_not_wait_for_ever(queue_of):
    begun, gate = threading.Event(), threading.Event()

    def make():
        begun.set()
        assert gate.wait(60)
        return echo(0)

    queue = queue_of(max_staleness=3, timeout=0.05)
    queue.launch(0, 0, make)
    queue.launch(1, 0, make)
    assert begun.wait(60)
    with pytest.raises(TimeoutError, match=r"batch 0 was not sampled within 0\.05 s; raise run\."):
        queue.take(0)
    closing = threading.Thread(target=queue.close)
    closing.start()
    closing.join(30)  # the worker is still held: only the deadline can end this
    still_closing = closing.is_alive()
    gate.set()
    closing.join()
    assert not still_closing
    assert queue.pending() == [0, 1]
    with pytest.raises(CancelledError):
        queue.take(1)
