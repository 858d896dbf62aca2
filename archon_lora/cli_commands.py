"""``archon-lora``: train, make a tiny model, run the demonstration.

Exit status: 0 fine, 1 the run failed or a check did not hold, 2 a wrong setting or argument,
3 the store failed, 143 a SIGTERM ended the training after its last step was committed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import signal
import sys
import tomllib
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from archon_lora.errors import (
    ArchonLoraError,
    LoRAConfigError,
    ModelLoadError,
    ParallelConfigError,
    TargetError,
    TrainConfigError,
)
from ckpt.about import package_version
from ckpt.cli_console import STORAGE, USAGE, AsJson, AsLines, store_remedy, write_json, write_line
from ckpt.cli_group import Group, wants_json
from ckpt.errors import CkptError, ConfigError, StorageError, UnrestoredRoot

FAILED = 1
PREEMPTED = 128 + signal.SIGTERM
"""What a shell reports for a process that SIGTERM ended; here the work is saved as well."""
_PIPE_WIDTH = 140

_SETTINGS_ERRORS = (
    TrainConfigError,
    LoRAConfigError,
    TargetError,
    ModelLoadError,
    ParallelConfigError,
    ConfigError,
    UnrestoredRoot,
)
"""What the user's own settings cause: reported in one line, with status 2."""

_EXIT_STATUS = (
    "Exit status: 0 fine; 1 the run failed or a check did not hold; 2 a wrong setting or argument; "
    "3 the store failed; 143 a SIGTERM ended the training after its last step was committed."
)


class _Program(Group):
    """The commands; under a launcher every line says which rank speaks."""

    def complain(self, message: str) -> None:
        """One line on standard error."""
        _complain(message)


app = typer.Typer(
    name="archon-lora",
    cls=_Program,
    epilog=_EXIT_STATUS,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"archon-lora {package_version()}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """LoRA reinforcement learning with resumable, sharded checkpoints."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file; see docs/main-job.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one setting."),
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Begin with this PEFT directory's adapter, unless there is a checkpoint.",
        ),
    ] = None,
    rollout: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Who samples: local, vllm or sglang (rollout.source)."),
    ] = None,
    engines: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            metavar="URL",
            help="A replica, such as http://127.0.0.1:8000; once for each (engine.urls).",
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print every setting as the run would have it."),
    ] = False,
    as_json: AsLines = False,
) -> None:
    """Train an adapter, going on from the newest checkpoint if there is one.

    Runs on one rank by itself, and on any number of ranks under
    ``torchrun --nproc-per-node N -m archon_lora.cli train CONFIG``.
    """
    from archon_lora.rl.config import load_config
    from archon_lora.rl.settings import config_text, environment_overrides

    logging.basicConfig(format=f"archon-lora{_rank_note()}: %(message)s", level=logging.WARNING)
    settings = [*environment_overrides(os.environ), *(overrides or ())]
    if warm_start is not None:
        settings.append(f"warm_start.url={json.dumps(warm_start)}")
    if rollout is not None:
        settings.append(f"rollout.source={json.dumps(rollout)}")
    if engines:
        settings.append(f"engine.urls={json.dumps(engines)}")
    loaded = load_config(config, settings)
    if print_config:
        text = config_text(loaded)
        if as_json:
            write_line(tomllib.loads(text))
        else:
            sys.stdout.write(text)
        return
    _require("rl", "tokenizers")
    from archon_lora.rl.loop import run_training

    stopped = run_training(loaded, on_record=write_line if as_json else None)
    if stopped is not None:
        note = f"step {stopped} is committed; the same command goes on from it"
        sys.stderr.write(f"archon-lora{_rank_note()}: stopped by a signal: {note}\n")
        raise typer.Exit(PREEMPTED)


@app.command("make-tiny")
def make_tiny(
    directory: Annotated[Path, typer.Argument(help="Directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    hidden: Annotated[int, typer.Option(help="Width of the residual stream.")] = 64,
    layers: Annotated[int, typer.Option(help="Number of blocks.")] = 2,
    std: Annotated[
        float,
        typer.Option(help="Standard deviation of the weights; 0.1 lets an adapter move them."),
    ] = 0.1,
    as_json: AsJson = False,
) -> None:
    """Write a tiny random Qwen2 model in HuggingFace's format, with a tokenizer."""
    _require("rl", "tokenizers")
    from archon_lora.models.tiny import write_tiny_qwen2

    if not 0 < std < math.inf:
        msg = f"it must be a finite number above 0, got {std}"
        raise typer.BadParameter(msg, param_hint="--std")
    write_tiny_qwen2(directory, seed=seed, hidden=hidden, layers=layers, std=std)
    if as_json:
        files = sorted(path.name for path in directory.iterdir())
        made = {"seed": seed, "hidden": hidden, "layers": layers, "std": std, "files": files}
        write_json({"directory": str(directory), **made})
        return
    typer.echo(f"wrote a tiny Qwen2 model to {directory}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for models, logs and results.")] = Path(
        "demo-out"
    ),
    as_json: AsJson = False,
) -> None:
    """Train, kill, resume, reshard, export and check every step of it, on an embedded S3."""
    _require("demo", "matplotlib", "moto", "peft", "tokenizers", "transformers")
    from archon_lora.rl.demo.run import DemoSettings, run_demo

    # The default would end this process at once and leave its children behind.
    signal.signal(signal.SIGTERM, _stop)
    console = Console(stderr=as_json)
    if not console.is_terminal:
        # rich would assume 80 columns and fold every cell.
        console = Console(stderr=as_json, width=_PIPE_WIDTH)
    report = run_demo(out, DemoSettings(), console=console)
    if as_json:
        write_json(report.document())
    if not report.passed:
        raise typer.Exit(FAILED)


for _command in app.registered_commands:
    _command.epilog = _EXIT_STATUS


def run() -> None:
    """Run the command line; turns errors into one line and an exit status."""
    try:
        app()
    except _SETTINGS_ERRORS as err:
        _fail(err, USAGE)
    except StorageError as err:
        remedy = store_remedy(str(err), option="checkpoint.storage_options")
        _fail(err, STORAGE, remedy)
    except (ArchonLoraError, CkptError) as err:
        _fail(err, FAILED)
    except OSError as err:
        if err.filename is None:  # of a connection, say: where it came from matters
            traceback.print_exc()
        _fail(err, STORAGE, "check the path, its permissions and the space on its disk")
    except Exception as err:  # noqa: BLE001 - the last resort: everything is shown, nothing hidden
        traceback.print_exc()
        _fail(err, FAILED)


def _require(extra: str, *modules: str) -> None:
    """Refuse what is not installed at once, and not when minutes of work have come to need it."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        msg = f"this command needs {names}: pip install 'archon-lora[{extra}]'"
        raise TrainConfigError(msg)


def _stop(number: int, frame: object) -> None:
    """Leave as an exception does, so that every child is ended on the way out."""
    raise SystemExit(128 + number)


def _fail(error: Exception, status: int, remedy: str | None = None) -> None:
    """Say what failed and end the process at once.

    A plain exit would first join every thread, and one of them may be waiting for a rank that
    has died: the others must not outlive it by a deadline of minutes.
    """
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    parts = [text, *getattr(error, "__notes__", ()), *([] if remedy is None else [remedy])]
    message = " ".join("; ".join(parts).split())
    if wants_json(sys.argv[1:]):
        write_line({"error": {"type": type(error).__name__, "message": message}})
    sys.stdout.flush()
    _complain(message)
    sys.stderr.flush()
    os._exit(status)


def _complain(message: str) -> None:
    sys.stderr.write(f"archon-lora{_rank_note()}: {message}\n")


def _rank_note() -> str:
    """Which rank speaks, under a launcher."""
    rank = os.environ.get("RANK")
    return "" if rank is None else f" [rank {rank}]"
