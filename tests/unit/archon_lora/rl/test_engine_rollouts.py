"""The loop on one rank with stand-in replicas: what is sampled is of the version that was asked."""

import itertools
import json
import logging
import threading

import pytest
import torch.distributed as dist
from support.engine_brains import ModelBrain, prompt_logprobs
from support.fake_engine import FakeEngine

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl import loop
from archon_lora.rl.config import load_config
from archon_lora.rl.demo.findings import EXACT, bits
from archon_lora.rl.fleet import RolloutsFailed
from archon_lora.rl.loop import run_training
from archon_lora.rl.metrics import read_events, read_metrics
from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import EngineError
from ckpt.handoff.registry import Registry
from ckpt.handoff.vllm import VllmEngine

pytestmark = pytest.mark.slow

TESTS = itertools.count(1)
AWAY = {"at": "any", "do": "drop"}
"""As good as dead: every connection ends without an answer."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_qwen2(tmp_path_factory.mktemp("m") / "tiny", hidden=32, layers=1, std=0.1)


@pytest.fixture(scope="module")
def engines(tiny):
    with FakeEngine("vllm", model=tiny) as one, FakeEngine("vllm", model=tiny) as two:
        yield one, two


@pytest.fixture
def replicas(engines):
    """Two replicas, both running and without adapters."""
    yield engines
    for engine in engines:
        engine.faults()
    forget(engines)


def forget(replicas):
    """Take all adapters off the lists: another run's are not this one's to take off."""
    for replica in replicas:
        driver = open_engine(replica.address)
        for name in driver.adapters():
            driver.unload(name)
        driver.close()


@pytest.fixture
def start(tmp_path, tiny):
    """Trains run ``name`` on the given replicas; returns its metrics by step."""
    test = next(TESTS)  # engines never see a name twice, as in life

    def train(name, replicas, *overrides):
        path = tmp_path / f"{name}.toml"
        path.write_text(f"""
            [run]
            name = "{name}{test}"
            metrics = "{tmp_path / name}/metrics.jsonl"
            [model]
            path = "{tiny}"
            [rollout]
            source = "{replicas[0].kind}"
            prompts_per_step = 2
            group_size = 3
            max_new_tokens = 4
            [engine]
            urls = {json.dumps([replica.url for replica in replicas])}
            request_timeout_s = 20
            ready_timeout_s = 1
            attempts = 2
            [checkpoint]
            root = "{tmp_path / name}/root"
        """)
        try:
            run_training(load_config(path, overrides))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return read_metrics(tmp_path / name / "metrics.jsonl")

    return train


def exact(records):
    return {step: [bits(r[key]) for key in EXACT] for step, r in records.items()}


def before_step(monkeypatch, act):
    """Call ``act(step)`` on the trainer's thread just before each training step."""
    honest = loop.train_on

    def acting(engine, batch, config, *, group):
        act(batch.step)
        return honest(engine, batch, config, group=group)

    monkeypatch.setattr(loop, "train_on", acting)


@pytest.mark.parametrize(("staleness", "every"), [(1, 1), (3, 2)])
def test_versions_follow_the_plan_and_a_resume_is_exact(
    start, tmp_path, replicas, staleness, every
):
    settings = (f"rollout.max_staleness={staleness}", f"engine.handover_every={every}")
    whole = start("whole", replicas, "run.steps=6", *settings)
    ahead = staleness - (every - 1)
    made = {s: max(0, s - ahead) // every * every for s in range(6)}
    assert {s: s - r["staleness"] for s, r in whole.items()} == made
    registry = Registry(tmp_path / "whole" / "root")
    for step, record in whole.items():
        (name,) = record["made_by"]
        assert registry.get(name).policy_version == made[step]
        assert (record["replicas"], record["refused"], record["failed_requests"]) == (2, 0, 0)
    forget(replicas)
    start("parts", replicas, "run.steps=3", *settings)
    parts = start("parts", replicas, "run.steps=6", *settings)
    assert exact(parts) == exact(whole)
    assert len({record["loss"] for record in whole.values()}) == 6
    second = read_events(tmp_path / "parts" / "metrics.jsonl", "start")[1]
    assert second["in_flight"] == list(range(3, 3 + ahead))


def test_samples_that_a_resume_finds_too_old_are_sampled_anew_and_counted(start, replicas):
    start("run", replicas, "run.steps=3", "rollout.max_staleness=2")
    records = start("run", replicas, "run.steps=6", "rollout.max_staleness=0")
    assert [r["staleness"] for r in records.values()] == [0, 1, 2, 0, 0, 0]
    assert [r["stale"] for r in records.values()] == [0, 0, 0, 6, 6, 0]
    (name,) = records[3]["made_by"]
    assert name not in records[2]["made_by"]


def test_what_is_published_says_what_an_engine_must_answer(start, tmp_path, tiny, replicas):
    start("run", replicas, "run.steps=4", "checkpoint.publish_every=0")
    registry = Registry(tmp_path / "run" / "root")
    versions = registry.newer_than(None)
    assert [v.policy_version for v in versions] == [0, 1, 2, 3]
    brain = ModelBrain(tiny)  # fp32 and merged: computed in quite another way
    for version in versions:
        probe = version.probe
        assert (probe.dtype, probe.tolerance) == ("bfloat16", 0.05)
        under = prompt_logprobs(brain, list(probe.token_ids), version.url, "vllm")
        base = prompt_logprobs(brain, list(probe.token_ids), None, "vllm")
        assert probe.logprobs == pytest.approx(under, abs=0.04)
        assert probe.base_logprobs == pytest.approx(base, abs=0.04)
    assert versions[0].probe.effect == 0  # nothing has been trained yet
    assert versions[3].probe.effect > 2 * versions[3].probe.tolerance


def test_a_replica_that_restarts_is_brought_back_before_it_samples(start, replicas, monkeypatch):
    before_step(monkeypatch, lambda step: replicas[0].restart() if step == 2 else None)
    records = start("run", replicas, "run.steps=5")
    assert [r["staleness"] for r in records.values()] == [0, 1, 1, 1, 1]
    assert records[4]["replicas"] == 2
    asked = {item["body"]["model"] for item in replicas[0].requests("/v1/completions")} - {"base"}
    assert records[4]["made_by"][0] in asked


def test_a_replica_that_dies_while_it_samples_costs_a_repetition(start, replicas, monkeypatch):
    honest, deaths = VllmEngine.generate, []

    def dying(self, token_ids, adapter, sampling):
        if self.url == replicas[0].url and adapter.endswith("-v00000004") and not deaths:
            deaths.append(adapter)
            replicas[0].faults(AWAY)
        return honest(self, token_ids, adapter, sampling)

    monkeypatch.setattr(VllmEngine, "generate", dying)
    records = start("run", replicas, "run.steps=5", "rollout.max_staleness=0")
    assert [r["replicas"] for r in records.values()] == [2, 2, 2, 1, 1]
    assert [r["failed_requests"] for r in records.values()] == [0, 0, 0, 1, 0]
    assert [r["rounds"] for r in records.values()] == [1, 1, 1, 2, 1]
    assert records[3]["made_by"] == deaths


def test_samples_around_a_restart_are_refused(start, replicas, monkeypatch):
    """Whatever they look like: nobody knows which process gave them."""
    generate, incarnation, lives = VllmEngine.generate, VllmEngine.incarnation, ["first"]

    def restarting(self, token_ids, adapter, sampling):
        found = generate(self, token_ids, adapter, sampling)
        if self.url == replicas[0].url and adapter.endswith("-v00000003") and len(lives) == 1:
            lives.append("second")
        return found

    def told(self):
        return incarnation(self) if self.url != replicas[0].url else lives[-1]

    monkeypatch.setattr(VllmEngine, "generate", restarting)
    monkeypatch.setattr(VllmEngine, "incarnation", told)
    records = start("run", replicas, "run.steps=4", "rollout.max_staleness=0")
    assert [r["refused"] for r in records.values()] == [0, 0, 3, 0]
    assert [r["rounds"] for r in records.values()] == [1, 1, 2, 1]


def test_the_only_replica_gets_the_time_to_start_again(start, replicas, monkeypatch):
    later = []

    def act(step):
        if step == 2:
            replicas[0].kill()
            later.append(threading.Timer(2.5, replicas[0].start))
            later[0].start()

    before_step(monkeypatch, act)
    records = start("run", replicas[:1], "run.steps=5", "engine.ready_timeout_s=60")
    later[0].join()
    assert [r["staleness"] for r in records.values()] == [0, 1, 1, 1, 1]
    assert max(r["rounds"] for r in records.values()) > 1


def test_without_any_replica_the_run_ends_and_says_why(start, replicas, monkeypatch):
    def act(step):
        if step == 1:
            for replica in replicas:
                replica.faults(AWAY)

    before_step(monkeypatch, act)
    with pytest.raises(RolloutsFailed, match=r"run\d+-v\d+.*after 2 tries.*no answer"):
        start("run", replicas, "run.steps=5")


def test_no_replica_at_the_start_is_an_error_of_its_own(start, replicas):
    replicas[0].faults(AWAY)
    with pytest.raises(EngineError, match=r"is it ready\?"):
        start("run", replicas[:1], "run.steps=2")


def lie(monkeypatch, url):
    """From now on one replica samples the base, whatever it is asked for."""
    honest = VllmEngine.generate

    def lying(self, token_ids, adapter, sampling):
        return honest(self, token_ids, None if self.url == url else adapter, sampling)

    monkeypatch.setattr(VllmEngine, "generate", lying)


def test_samples_of_another_policy_are_refused_and_asked_of_others(
    start, replicas, monkeypatch, caplog
):
    def act(step):
        if step == 3:
            lie(monkeypatch, replicas[0].url)

    before_step(monkeypatch, act)
    with caplog.at_level(logging.WARNING, "archon_lora.rl.fleet"):
        records = start("run", replicas, "run.steps=6", "rollout.max_staleness=0")
    assert [r["refused"] for r in records.values()][:4] == [0, 0, 0, 0]
    assert all(records[step]["refused"] >= 3 for step in (4, 5))
    assert all(records[step]["rounds"] > 1 for step in (4, 5))
    assert f"{replicas[0].url}: its samples are not of run" in caplog.text


def test_a_single_replica_of_another_policy_ends_the_run(start, replicas, monkeypatch):
    before_step(monkeypatch, lambda step: lie(monkeypatch, replicas[0].url) if step == 3 else None)
    with pytest.raises(RolloutsFailed, match=r"samples are not of run\d+-v0000000\d"):
        start("run", replicas[:1], "run.steps=6")


def test_a_replica_that_loads_another_version_never_samples(start, tmp_path, replicas, monkeypatch):
    def act(step):
        if step == 3:
            (older,) = (tmp_path / "run" / "adapters").glob("*-v00000002")
            replicas[0].faults({"at": "load", "do": "other", "path": str(older)})

    before_step(monkeypatch, act)
    records = start("run", replicas, "run.steps=6", "engine.slots=8")
    assert [r["replicas"] for r in records.values()] == [2, 2, 2, 1, 1, 1]
    assert sum(r["refused"] for r in records.values()) == 0


def test_logprobs_of_another_temperature_are_noticed(start, replicas):
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        start("run", replicas[:1], "run.steps=2", "rollout.temperature=0.6")


def test_sglang_replicas_and_a_local_tier(start, tmp_path, tiny):
    with FakeEngine("sglang", model=tiny) as engine:
        records = start(
            "run", [engine], "run.steps=4", "rollout.temperature=0.8",
            f'checkpoint.local_tier="{tmp_path / "tier"}"', "checkpoint.wait_mirrored_s=60",
        )  # fmt: skip
    assert [r["staleness"] for r in records.values()] == [0, 1, 1, 1]
    versions = [Registry(tmp_path / where).newer_than(None) for where in ("tier", "run/root")]
    assert versions[0][-1].policy_version == versions[1][-1].policy_version == 4
    assert [v.number for v in versions[1]] == [1, 2, 3, 4, 5]
