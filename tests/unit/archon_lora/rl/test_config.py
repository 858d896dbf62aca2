"""A wrong setting is named, with what was given and what is wanted."""

import dataclasses
from pathlib import Path

import pytest

from archon_lora.errors import TrainConfigError
from archon_lora.rl.config import TrainConfig, load_config, parse_config

MINIMAL = {"model": {"path": "m"}, "checkpoint": {"root": "r"}}


def with_key(section, key, value):
    data = {name: dict(table) for name, table in MINIMAL.items()}
    data.setdefault(section, {})[key] = value
    return data


def test_defaults_fill_in():
    config = parse_config(MINIMAL)
    assert config.rollout.max_staleness == 1
    assert config.checkpoint.save_every == 1
    assert config.run.threads == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3


def test_lists_become_tuples_and_integers_serve_as_floats():
    config = parse_config(
        {
            **MINIMAL,
            "lora": {"target_modules": ["q_proj", "v_proj"], "alpha": 8},
            "optimizer": {"betas": [0, 0.5]},
        }
    )
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.optimizer.betas == (0.0, 0.5)
    assert isinstance(config.lora.alpha, float)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("rollout", "group_sise", 4, "unknown key rollout.group_sise; did you mean group_size"),
        ("rollout", "group_size", 1, "rollout.group_size must be at least 2"),
        ("rollout", "group_size", "8", "rollout.group_size must be an integer, got '8'"),
        ("rollout", "max_staleness", -1, "rollout.max_staleness must be at least 0, got -1"),
        ("rollout", "temperature", 0.0, "rollout.temperature must be > 0, got 0.0"),
        ("run", "steps", True, "run.steps must be an integer, got True"),
        ("run", "steps", 0, "run.steps must be at least 1, got 0"),
        ("run", "timeout_s", 0, "run.timeout_s must be > 0"),
        ("model", "dtype", "float8", "model.dtype must be one of float32, bfloat16"),
        ("task", "name", "x", "task.name must be one of kinds, addition, got 'x'"),
        ("optimizer", "schedule", "zigzag", "optimizer.schedule must be one of constant, linear"),
        ("checkpoint", "storage_options", "x", "checkpoint.storage_options must be a table"),
        ("lora", "target_modules", [1], "lora.target_modules must be a string or a list"),
        ("optimizer", "betas", [0.9], "optimizer.betas must be two numbers"),
        ("optimizer", "lr", -1.0, "optimizer.lr must be > 0, got -1.0"),
        ("grpo", "clip", 1.0, "grpo.clip must be between 0 and 1, got 1.0"),
        ("grpo", "kl_coef", "big", "grpo.kl_coef must be a number, got 'big'"),
        ("checkpoint", "fresh", 1, "checkpoint.fresh must be true or false, got 1"),
        ("checkpoint", "keep_latest", 0, "checkpoint.keep_latest must be at least 1"),
        ("checkpoint", "root", "", "checkpoint.root must be a path or URL"),
        ("modle", "path", "m", "unknown section \\[modle\\]"),
    ],
)
def test_a_wrong_setting_is_named(section, key, value, message):
    with pytest.raises(TrainConfigError, match=message):
        parse_config(with_key(section, key, value))


def test_required_keys_are_asked_for():
    with pytest.raises(TrainConfigError, match=r"model.path is required.*--set model.path="):
        parse_config({"checkpoint": {"root": "r"}})
    with pytest.raises(TrainConfigError, match=r"checkpoint.root is required"):
        parse_config({"model": {"path": "m"}})


def test_a_section_must_be_a_table():
    with pytest.raises(TrainConfigError, match=r"\[run\] must be a table, got 3"):
        parse_config({**MINIMAL, "run": 3})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return path


def test_overrides_win_over_the_file(tmp_path):
    path = write(tmp_path, '[model]\npath = "m"\n[checkpoint]\nroot = "r"\n[run]\nsteps = 3\n')
    config = load_config(
        path,
        ["run.steps=7", "checkpoint.root=s3://bucket/run", "lora.target_modules=['q_proj']"],
    )
    assert config.run.steps == 7
    assert config.checkpoint.root == "s3://bucket/run"
    assert config.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize("text", ["steps=3", "run.steps", "run.=3", "=3"])
def test_a_malformed_override_is_named(tmp_path, text):
    path = write(tmp_path, '[model]\npath = "m"\n[checkpoint]\nroot = "r"\n')
    with pytest.raises(TrainConfigError, match=r"--set wants section.key=value"):
        load_config(path, [text])


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(TrainConfigError, match=r"cannot read the config .*absent\.toml"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(TrainConfigError, match="is not valid TOML"):
        load_config(write(tmp_path, "[model\n"))


def test_the_resume_key_covers_what_shapes_the_data():
    base = parse_config(MINIMAL)
    other = parse_config(with_key("rollout", "group_size", 4))
    longer = parse_config(with_key("run", "steps", 400))
    assert base.resume_key() != other.resume_key()
    assert base.resume_key() == longer.resume_key()


def test_the_reference_is_the_warm_start_where_there_is_one():
    assert parse_config(MINIMAL).reference == "base"
    warm = with_key("warm_start", "url", "somewhere")
    assert parse_config(warm).reference == "warm-start"
    assert parse_config({**warm, "grpo": {"reference": "base"}}).reference == "base"
    with pytest.raises(TrainConfigError, match=r"grpo\.reference='warm-start'.*url is empty"):
        parse_config(with_key("grpo", "reference", "warm-start"))


def test_every_section_has_a_default_or_a_required_key():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == {
        "model", "checkpoint", "run", "lora", "optimizer", "task", "rollout", "engine", "grpo",
        "parallel", "warm_start",
    }  # fmt: skip


def test_a_layout_that_cannot_be_names_its_key():
    with pytest.raises(TrainConfigError, match=r"parallel.tp must be an integer >= 1, got 0"):
        parse_config(with_key("parallel", "tp", 0))
    with pytest.raises(TrainConfigError, match=r"parallel.pp=2: rollouts and probes of this job"):
        parse_config(with_key("parallel", "pp", 2))
    with pytest.raises(TrainConfigError, match=r"unknown key parallel.dp; "):
        parse_config(with_key("parallel", "dp", 2))


ENGINE = {"rollout": {"source": "vllm"}, "engine": {"urls": ["http://127.0.0.1:8000"]}}


def with_engine(**changes):
    """The smallest settings with an engine, and changes by section."""
    merged = {**MINIMAL, **ENGINE}
    return {s: {**merged.get(s, {}), **changes.get(s, {})} for s in merged.keys() | changes.keys()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": {"urls": []}}, r"rollout.source='vllm' and engine.urls=\[\] do not fit"),
        ({"rollout": {"source": "local"}}, r"rollout.source='local' .* do not fit"),
        ({"engine": {"urls": ["http://a:1", "http://a:1"]}}, "engine.urls must be different"),
        ({"engine": {"handover_every": 3}}, "handover_every=3 lets samples be 2 versions old"),
        ({"engine": {"quorum": 2}}, "engine.quorum=2, and engine.urls names 1"),
        ({"engine": {"slots": 1}}, "engine.slots must be at least 2"),
        ({"engine": {"tolerance": 0.0}}, "engine.tolerance must be > 0"),
        ({"engine": {"batch_timeout_s": float("inf")}}, "engine.batch_timeout_s must be > 0"),
        ({"checkpoint": {"when_busy": "skip"}}, "checkpoint.when_busy='skip' may leave out"),
        ({"checkpoint": {"probe": False}}, "checkpoint.probe=false leaves no way to prove"),
        ({"checkpoint": {"wait_mirrored_s": 5}}, "waits for checkpoint.local_tier"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(TrainConfigError, match=message):
        parse_config(with_engine(**changes))


@pytest.mark.parametrize(("bound", "every", "ahead"), [(0, 1, 0), (3, 1, 3), (3, 2, 2), (3, 4, 0)])
def test_rarer_hand_overs_leave_less_to_sample_ahead(bound, every, ahead):
    changes = {"rollout": {"max_staleness": bound}, "engine": {"handover_every": every}}
    assert parse_config(with_engine(**changes)).ahead == ahead


def test_who_samples_and_how_old_samples_may_be_can_change_on_a_resume():
    local = parse_config({**MINIMAL, "rollout": {"max_staleness": 4}})
    assert parse_config(with_engine()).resume_key() == local.resume_key()


def test_what_lora_does_not_do_is_refused_with_the_reason(tmp_path):
    path = write(tmp_path, '[model]\npath = "m"\n[checkpoint]\nroot = "r"\n')
    with pytest.raises(
        TrainConfigError, match=r"lora\.use_dora is not supported: DoRA's row norms"
    ):
        load_config(path, ["lora.use_dora=true"])
