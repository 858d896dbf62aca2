"""The loop on one rank: staleness, exact resume, cadence, and what a resume refuses."""

import shutil
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from archon_lora.errors import TrainConfigError
from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl import build, loop
from archon_lora.rl.config import load_config
from archon_lora.rl.demo.findings import EXACT, bits
from archon_lora.rl.loop import run_training
from archon_lora.rl.metrics import read_events, read_metrics
from ckpt import CkptError
from ckpt.catalog import list_steps
from ckpt.handoff.registry import Registry
from ckpt.save import SavePipeline
from ckpt.storage import open_storage
from ckpt.versions import list_versions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_qwen2(tmp_path_factory.mktemp("m") / "tiny", hidden=32, layers=1, std=0.1)


@pytest.fixture
def start(tmp_path, tiny):
    """Trains run ``name`` with overrides; returns its metrics by step."""

    def train(name, *overrides):
        path = tmp_path / f"{name}.toml"
        path.write_text(f"""
            [run]
            metrics = "{tmp_path / name}.jsonl"
            [model]
            path = "{tiny}"
            [task]
            # three kinds and two prompts a step: a wrong position asks for other kinds
            kinds = ["digits", "lower", "upper"]
            [rollout]
            prompts_per_step = 2
            group_size = 3
            max_new_tokens = 4
            [checkpoint]
            root = "{tmp_path / name}"
        """)
        try:
            run_training(load_config(path, overrides))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        return read_metrics(tmp_path / f"{name}.jsonl")

    return train


def exact(records):
    return {step: [bits(r[key]) for key in EXACT] for step, r in records.items()}


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_staleness_is_bounded_and_a_resume_is_exact(start, tmp_path, staleness):
    setting = f"rollout.max_staleness={staleness}"
    whole = start("whole", "run.steps=7", setting)
    assert [r["staleness"] for r in whole.values()] == [min(s, staleness) for s in range(7)]
    start("parts", "run.steps=3", setting)
    parts = start("parts", "run.steps=7", setting)
    assert exact(parts) == exact(whole)
    first, second = read_events(tmp_path / "parts.jsonl", "start")
    assert (first["restored"], second["restored"]) == (None, 2)
    assert second["in_flight"] == list(range(3, 3 + staleness))
    assert len({record["loss"] for record in whole.values()}) == 7


def test_a_warm_start_begins_where_the_adapter_was_and_a_resume_ignores_it(start, tmp_path):
    """The published version is in the form for engines; the run's own scaling is 2."""
    start("first", "run.steps=2", "checkpoint.publish_dtype=float32")
    (version,) = list_versions(open_storage(tmp_path / "first"))
    url = f"{tmp_path}/first/{version.path}"
    warm = f"warm_start.url={url}"
    cold = start("cold", "run.steps=1", "optimizer.lr=1e-9")
    begun = start("warm", "run.steps=1", "optimizer.lr=1e-9", warm)
    assert begun[0]["kl"] == cold[0]["kl"] == 0.0  # near to what it began with
    far = start("far", "run.steps=1", "optimizer.lr=1e-9", warm, "grpo.reference=base")
    assert far[0]["kl"] > 0.0
    (event,) = read_events(tmp_path / "warm.jsonl", "start")
    assert event["warm_start"]["url"] == url
    assert event["warm_start"]["version"] == version.name
    # The same command again: the run's own steps come first, and say where it began.
    start("warm", "run.steps=2", "optimizer.lr=1e-9", "warm_start.url=nowhere")
    (_, again) = read_events(tmp_path / "warm.jsonl", "start")
    assert again["restored"] == 0
    assert again["warm_start"] == event["warm_start"]
    with pytest.raises(TrainConfigError, match=r"grpo\.reference='base'.*adapters\.reference\."):
        start("warm", "run.steps=3", "grpo.reference=base", warm)
    with pytest.raises(TrainConfigError, match=r"warm_start\.url .* rank 8, the live adapter 16"):
        start("other", "lora.rank=16", warm)


def test_samples_that_a_resume_finds_too_old_are_made_anew_and_counted(start):
    start("run", "run.steps=3", "rollout.max_staleness=2")
    records = start("run", "run.steps=6", "rollout.max_staleness=1")
    # Those for steps 3 and 4 were made by versions 1 and 2.
    assert [r["staleness"] for r in records.values()] == [0, 1, 2, 0, 0, 1]
    assert [r["stale"] for r in records.values()] == [0, 0, 0, 6, 6, 0]


def test_the_last_step_is_saved_however_busy_it_is(start, tmp_path, monkeypatch):
    """With "skip", saves are left out while two are under way; that one never is."""
    honest = SavePipeline.run

    def slow(pipeline, job):
        time.sleep(1.0)
        honest(pipeline, job)

    monkeypatch.setattr(SavePipeline, "run", slow)
    records = start("run", "run.steps=9", "checkpoint.when_busy=skip", "checkpoint.keep_latest=9")
    steps = [entry.step for entry in list_steps(open_storage(tmp_path / "run"))]
    assert steps[-1] == 8
    assert len(steps) < 9
    assert records[8]["published"]


def test_a_probe_goes_with_every_version_unless_it_is_not_wanted(start, tmp_path):
    start("run", "run.steps=2")
    start("bare", "run.steps=2", "checkpoint.probe=false")
    (version,) = Registry(tmp_path / "run").newer_than(None)
    assert version.probe.dtype == "bfloat16"
    assert version.probe.effect > 0
    (bare,) = Registry(tmp_path / "bare").newer_than(None)
    assert bare.probe is None


def test_another_seed_is_another_run(start):
    assert exact(start("a", "run.steps=2")) != exact(start("b", "run.steps=2", "run.seed=1"))


def test_cadence_of_saves_and_versions(start, tmp_path):
    start(
        "run",
        "run.steps=7",
        "checkpoint.save_every=2",
        "checkpoint.publish_every=4",
        "checkpoint.keep_latest=10",
    )
    storage = open_storage(tmp_path / "run")
    assert [entry.step for entry in list_steps(storage)] == [1, 3, 5, 6]
    assert [v.manifest.step for v in list_versions(storage)] == [3, 6]
    assert [v.manifest.policy_version for v in list_versions(storage)] == [4, 7]


def test_retention_keeps_the_newest_and_every_kth(start, tmp_path):
    start(
        "run",
        "run.steps=7",
        "checkpoint.keep_latest=2",
        "checkpoint.keep_every=3",
        "checkpoint.keep_versions=1",
        "checkpoint.publish_every=2",
    )
    storage = open_storage(tmp_path / "run")
    assert [entry.step for entry in list_steps(storage)] == [0, 3, 5, 6]
    assert [v.manifest.step for v in list_versions(storage)] == [6]


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("rollout.group_size=4", "rollout"),
        ("task.kinds=['upper']", "task"),
        ("run.seed=9", "seed"),
    ],
)
def test_what_the_batches_in_flight_depend_on_may_not_change(start, override, section):
    start("run", "run.steps=2")
    with pytest.raises(TrainConfigError, match=rf"\[{section}\] differs from the checkpoint's"):
        start("run", "run.steps=4", override)


def test_a_base_of_other_weights_is_refused_and_taken_on_purpose(start, tiny, tmp_path):
    start("run", "run.steps=2")
    other = write_tiny_qwen2(tmp_path / "other", hidden=32, layers=1, std=0.1, seed=4)
    with pytest.raises(TrainConfigError, match="holds other weights than the checkpoint"):
        start("run", "run.steps=3", f'model.path="{other}"')
    moved = shutil.copytree(tiny, tmp_path / "moved")
    assert sorted(start("run", "run.steps=3", f'model.path="{moved}"')) == [0, 1, 2]
    on_purpose = (f'model.path="{other}"', "checkpoint.any_base=true")
    assert sorted(start("run", "run.steps=4", *on_purpose)) == [0, 1, 2, 3]
    # From here on the other one is the run's base.
    assert sorted(start("run", "run.steps=5", f'model.path="{other}"')) == [0, 1, 2, 3, 4]


def test_what_they_do_not_depend_on_may_change(start):
    start("run", "run.steps=2")
    records = start("run", "run.steps=3", "optimizer.warmup_steps=0", "checkpoint.publish_every=0")
    assert sorted(records) == [0, 1, 2]
    assert not records[2]["published"]


def test_a_finished_run_started_again_does_nothing(start, tmp_path):
    before = start("run", "run.steps=2")
    after = start("run", "run.steps=2")
    assert exact(before) == exact(after)
    assert [e["restored"] for e in read_events(tmp_path / "run.jsonl", "start")] == [None, 1]


def test_fresh_starts_over(start, tmp_path):
    start("run", "run.steps=2")
    start("run", "run.steps=2", "checkpoint.fresh=true")
    assert [e["restored"] for e in read_events(tmp_path / "run.jsonl", "start")] == [None, None]


def test_more_ranks_than_samples_are_refused(start, monkeypatch):
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 7)
    with pytest.raises(TrainConfigError, match=r"7 ranks cannot share 6 samples a step; raise"):
        start("run", "run.steps=1")


def test_an_error_in_a_step_still_lets_the_save_before_it_commit(start, tmp_path, monkeypatch):
    honest = loop.train_on

    def failing(engine, batch, config, *, group):
        if batch.step == 2:
            raise ZeroDivisionError("by hand")
        return honest(engine, batch, config, group=group)

    monkeypatch.setattr(loop, "train_on", failing)
    with pytest.raises(ZeroDivisionError):
        start("run", "run.steps=4")
    assert [entry.step for entry in list_steps(open_storage(tmp_path / "run"))] == [0, 1]


def test_a_save_that_fails_in_the_background_ends_the_run(start, tmp_path, monkeypatch):
    honest = loop.Run._save

    def sabotaged(run, step):
        if step == 1:
            run.manager._pipeline.run = lambda job: (_ for _ in ()).throw(CkptError("disk full"))
        return honest(run, step)

    monkeypatch.setattr(loop.Run, "_save", sabotaged)
    with pytest.raises(CkptError, match="disk full"):
        start("run", "run.steps=9")
    assert len(read_metrics(tmp_path / "run.jsonl")) < 9


def test_the_adapter_is_sampled_as_it_was_when_the_batch_was_launched(start, monkeypatch):
    """Version v's tensors, not whatever the trainer has made of them meanwhile."""
    seen = {}
    honest = build.build_maker

    def spying(config, engine):
        maker = honest(config, engine)

        def make(step, version, first, adapter):
            seen.setdefault(version, {k: v.clone() for k, v in adapter.items()})
            batch = maker.make(step, version, first, adapter)
            assert all(bool((seen[version][k] == v).all()) for k, v in adapter.items())
            return batch

        return SimpleNamespace(make=make)

    monkeypatch.setattr(build, "build_maker", spying)
    start("run", "run.steps=4")
    assert sorted(seen) == [0, 1, 2, 3]
    assert any(bool((seen[0][k] != seen[1][k]).any()) for k in seen[0])
