"""Settings from the environment, and the file that ``--print-config`` makes of them all."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from archon_lora.cli_commands import app
from archon_lora.errors import TrainConfigError
from archon_lora.rl.config import load_config, parse_config
from archon_lora.rl.settings import config_text, environment_overrides

REPO = Path(__file__).parents[4]
EXAMPLE = REPO / "examples" / "train.toml"


def test_what_is_printed_gives_the_same_run() -> None:
    config = load_config(
        EXAMPLE,
        [
            'checkpoint.storage_options={"client_kwargs" = {"region_name" = "x"}, "anon" = true}',
            'lora.target_modules=["q_proj", "v_proj"]',
            'run.name="a\x7fb\\n"',
        ],
    )
    assert parse_config(tomllib.loads(config_text(config))) == config


def test_no_secret_is_printed() -> None:
    options = 'checkpoint.storage_options={key = "AKIDSETTINGS", secret = "very-secret"}'
    text = config_text(load_config(EXAMPLE, [options]))
    assert "very-secret" not in text
    assert "AKIDSETTINGS" not in text
    assert tomllib.loads(text)["checkpoint"]["storage_options"]["secret"] == "***"


def test_the_environment_counts_for_more_than_the_file_and_for_less_than_the_command_line() -> None:
    environment = {"ARCHON_LORA__RUN__STEPS": "7", "ARCHON_LORA_ROOT": "no setting of a file"}
    overrides = environment_overrides(environment)
    assert load_config(EXAMPLE, overrides).run.steps == 7
    assert load_config(EXAMPLE, [*overrides, "run.steps=8"]).run.steps == 8


@pytest.mark.parametrize(
    ("name", "said"),
    [("ARCHON_LORA__RUN__STEP", "unknown key run.step"), ("ARCHON_LORA__RUN", "section.key=value")],
)
def test_a_variable_that_names_no_setting_is_refused(name: str, said: str) -> None:
    with pytest.raises(TrainConfigError, match=said):
        load_config(EXAMPLE, environment_overrides({name: "1"}))


def test_the_command_prints_and_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHON_LORA__RUN__SEED", "11")
    result = CliRunner().invoke(
        app, ["train", str(EXAMPLE), "--set", "run.steps=9", "--print-config"]
    )
    assert result.exit_code == 0, result.output
    printed = parse_config(tomllib.loads(result.stdout))
    assert (printed.run.seed, printed.run.steps) == (11, 9)
    assert printed.reference == load_config(EXAMPLE).reference
