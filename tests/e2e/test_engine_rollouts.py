"""Two ranks train on what two replicas sample, as real processes, while replicas come and go."""

import json

import pytest
from support.fake_engine import FakeEngine
from support.train_ranks import start_ranks

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.demo.findings import EXACT, bits
from archon_lora.rl.metrics import read_events, read_metrics
from ckpt.handoff.registry import Registry

pytestmark = [pytest.mark.e2e, pytest.mark.dist, pytest.mark.slow]

AWAY = {"at": "any", "do": "drop"}


def exact(records):
    return {step: [bits(r[key]) for key in EXACT] for step, r in records.items()}


@pytest.fixture
def job(tmp_path):
    """The settings of a run with a name; where its metrics and its root are."""
    model = write_tiny_qwen2(tmp_path / "m", hidden=32, layers=1, std=0.1)

    def write(name, engines):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "c.toml").write_text(
            f'[run]\nname = "{name}"\nsteps = 100000\ntimeout_s = 30\n'
            f'metrics = "{folder}/metrics.jsonl"\n[model]\npath = "{model}"\n'
            '[rollout]\nsource = "vllm"\nprompts_per_step = 2\ngroup_size = 2\n'
            "max_new_tokens = 3\nmax_staleness = 2\n"
            f"[engine]\nurls = {json.dumps([e.url for e in engines])}\n"
            "request_timeout_s = 20\nready_timeout_s = 2\n"
            f'[checkpoint]\nroot = "{folder}/root"\nvote_timeout_s = 30\n'
        )
        return folder / "c.toml", folder / "metrics.jsonl"

    model_engines = FakeEngine("vllm", model=model), FakeEngine("vllm", model=model)
    with model_engines[0], model_engines[1]:
        yield write, model_engines


def test_replicas_that_come_and_go_change_nothing_in_what_is_trained(job, tmp_path):
    write, engines = job
    config, metrics = write("disturbed", engines)
    ranks = start_ranks(config, 2, tmp_path)
    try:
        ranks[0].until(lambda: metrics.exists() and 2 in read_metrics(metrics), 90, "step 2")
        engines[0].restart()  # its adapters are gone
        back = max(read_metrics(metrics)) + 2
        ranks[0].until(
            lambda: any(s >= back and r["replicas"] == 2 for s, r in read_metrics(metrics).items()),
            90,
            "both replicas again",
        )
        for engine in engines:
            engine.faults(AWAY)
        assert [child.wait(150) for child in ranks] == [1, 1]
    finally:
        for child in ranks:
            child.stop()
    said = ranks[0].tail()
    assert "no samples that are shown to be of this version, after 3 tries" in said
    assert all(engine.url in said for engine in engines)
    assert "sampling batch" in ranks[1].tail()
    assert "rank 0: RolloutsFailed" in ranks[1].tail()

    for engine in engines:
        engine.restart()
    last = max(read_metrics(metrics))
    resumed = start_ranks(config, 2, tmp_path, run__steps=last + 4)
    for child in resumed:
        with child:
            child.succeed(150)
    assert len(read_events(metrics, "start")[-1]["in_flight"]) == 2

    for engine in engines:
        engine.restart()
    calm, calm_metrics = write("calm", engines)
    for child in start_ranks(calm, 2, tmp_path, run__steps=last + 4):
        with child:
            child.succeed(150)
    disturbed, whole = read_metrics(metrics), read_metrics(calm_metrics)
    assert sorted(whole) == list(range(last + 4))
    assert exact(disturbed) == exact(whole)
    registry = Registry(tmp_path / "disturbed" / "root")
    for step, record in disturbed.items():
        (name,) = record["made_by"]
        assert registry.get(name).policy_version == max(0, step - 2)
