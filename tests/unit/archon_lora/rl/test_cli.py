"""What a user gets wrong is one line that names it and the remedy, with exit status 2."""

import dataclasses
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import pytest
from support.archon_cli import caller

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.config import TrainConfig, load_config

REPO = Path(__file__).resolve().parents[4]


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls the program; returns exit status and stderr."""
    call = caller(monkeypatch, capsys)

    def status_and_errors(*args):
        told = call(*args)
        return told.status, told.err

    return status_and_errors


def write_config(tmp_path, model, extra=""):
    path = tmp_path / "c.toml"
    path.write_text(
        f'[model]\npath = "{model}"\n[checkpoint]\nroot = "{tmp_path / "root"}"\n{extra}'
    )
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_qwen2(tmp_path_factory.mktemp("m") / "tiny", std=0.1)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("[rollout]\ngroup_sise = 4\n", "unknown key rollout.group_sise; did you mean group_size?"),
        ("[rollout]\ngroup_size = 1\n", "rollout.group_size must be at least 2"),
        ("[rollout\n", "is not valid TOML"),
        ("[lora]\nrank = 0\n", "archon-lora: lora.rank must be an integer >= 1, got 0"),
        ("[lora]\ndropout = 1.5\n", "lora.dropout must be a number >= 0 and < 1, got 1.5"),
        ("[lora]\ntarget_modules = ['nowhere']\n", "nowhere"),
        ("[optimizer]\ngrad_clip = 0.0\n", "archon-lora: optimizer.grad_clip must be a number > 0"),
        (
            "[optimizer]\nschedule = 'linear'\nwarmup_steps = 99\n",
            "run.steps must be above optimizer.warmup_steps (99) with",
        ),
        ("[task]\nkinds = ['runes']\n", "task.kinds: unknown kind 'runes'"),
        ("[run]\nsteps = 0\n", "run.steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_2(run, tmp_path, tiny, extra, message):
    status, err = run("train", write_config(tmp_path, tiny, extra))
    assert status == 2
    assert message in err
    assert err.startswith("archon-lora")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "root" / "steps").exists()


def test_a_missing_model_directory_is_named_with_the_remedy(run, tmp_path):
    status, err = run("train", write_config(tmp_path, tmp_path / "absent"))
    assert status == 2
    assert re.search(r"model.path is .*absent, which is no directory.*archon-lora make-tiny", err)


def test_a_missing_or_broken_tokenizer_is_named(run, tmp_path):
    model = write_tiny_qwen2(tmp_path / "m")
    (model / "tokenizer.json").write_text("{}")
    status, err = run("train", write_config(tmp_path, model))
    assert (status, len(err.splitlines())) == (2, 1)
    assert "tokenizer.json cannot be read as a tokenizer" in err
    (model / "tokenizer.json").unlink()
    status, err = run("train", write_config(tmp_path, model))
    assert status == 2
    assert "has no tokenizer.json; save the tokenizer there" in err


def test_a_missing_config_file_is_named(run, tmp_path):
    status, err = run("train", tmp_path / "absent.toml")
    assert status == 2
    assert "absent.toml: No such file or directory" in err


def test_a_bad_override_is_named(run, tmp_path, tiny):
    status, err = run("train", write_config(tmp_path, tiny), "--set", "steps")
    assert status == 2
    assert "--set wants section.key=value, got 'steps'" in err


def test_an_unexpected_error_shows_its_traceback_and_status_1(run, tmp_path, tiny, monkeypatch):
    from archon_lora.rl import loop

    def broken(config, **more):
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(loop, "run_training", broken)
    status, err = run("train", write_config(tmp_path, tiny))
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1] == "archon-lora: by hand"


def test_the_rank_is_named_under_a_launcher(run, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    _, err = run("train", tmp_path / "absent.toml")
    assert err.startswith("archon-lora [rank 3]: cannot read the config")


def test_make_tiny_writes_a_model_that_trains(run, tmp_path):
    status, _ = run("make-tiny", tmp_path / "t", "--hidden", 32, "--layers", 1)
    assert status == 0
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "t").iterdir()
    }


def test_the_status_reaches_the_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "archon_lora.cli", "train", str(tmp_path / "absent.toml")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot read the config" in done.stderr


def test_the_example_is_a_valid_config():
    config = load_config(REPO / "examples" / "train.toml")
    assert config.rollout.max_staleness == 1
    assert config.checkpoint.save_every == 1


def documented_settings():
    """Section -> key -> default, from the tables of the reference."""
    tables: dict[str, dict[str, str]] = {}
    section = None
    for line in (REPO / "docs" / "main-job.md").read_text().splitlines():
        if found := re.fullmatch(r"### `\[(\w+)\]`", line):
            section = tables.setdefault(found[1], {})
        elif line.startswith("## "):
            section = None
        elif section is not None and (row := re.match(r"\| `(\w+)` \| (.+?) \|", line)):
            section[row[1]] = row[2]
    return tables


def test_the_reference_lists_every_key_with_its_default():
    documented = documented_settings()
    hints = typing.get_type_hints(TrainConfig)
    assert documented.keys() == hints.keys()
    for name, kind in hints.items():
        fields = {field.name: field for field in dataclasses.fields(kind)}
        assert documented[name].keys() == fields.keys(), name
        for key, field in fields.items():
            text = documented[name][key]
            if text == "required":
                assert field.default is dataclasses.MISSING
                continue
            if (name, key) == ("model", "name"):
                continue  # documented in words: it follows from another key
            default = field.default
            if default is dataclasses.MISSING:
                default = field.default_factory()
            written = tomllib.loads(f"value = {text.strip('`')}")["value"]
            written = tuple(written) if isinstance(written, list) else written
            assert written == default, f"{name}.{key}"


def test_a_warm_start_that_is_none_is_a_wrong_setting(run, tmp_path, tiny):
    """The option is the setting; quotes and backslashes in a path stay what they are."""
    config = write_config(tmp_path, tiny)
    status, text = run("train", config, "--warm-start", tmp_path / 'no "such\\ one')
    assert status == 2
    assert "warm_start.url does not name an adapter to begin with: no adapter_config.json" in text
    assert 'no "such\\ one' in text
    assert not (tmp_path / 'no "such\\ one').exists()


def test_engines_on_the_command_line_are_settings(run, tmp_path, tiny):
    config = write_config(tmp_path, tiny)
    status, text = run("train", config, "--rollout", "vllm", "--engine", "ftp://x")
    assert status == 2
    assert "an engine's address is http://host:port" in text
    status, text = run("train", config, "--engine", "http://a:1", "--engine", "http://b:1")
    assert status == 2
    assert "rollout.source='local' and engine.urls=['http://a:1', 'http://b:1'] do not fit" in text
    status, text = run("train", config, "--rollout", "openai")
    assert status == 2
    assert "rollout.source must be one of local, vllm, sglang, got 'openai'" in text


def test_without_an_engine_nothing_of_one_is_imported():
    code = (
        "import sys, archon_lora.cli_commands, archon_lora.rl.loop\n"
        "assert not {'httpx', 'ckpt.handoff.replica'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
