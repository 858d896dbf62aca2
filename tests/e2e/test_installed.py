"""What the wheel does in an environment that holds only what it asks for.

The environments here are linked together from what is installed already. ``make release`` makes a
real one, with pip, and looks at it with a type checker too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from support.environments import Environment, canonical, linked_environment, needed
from support.s3_server import S3Server

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "tests" / "support"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
ASKED = "CKPT_TEST_RELEASE"

NEED_AN_EXTRA = {
    "archon_lora.cli_commands": {"typer"},
    "archon_lora.rl": {"tokenizers", "rich", "httpx"},
    "ckpt.cli_": {"typer", "rich"},
    "ckpt.client": {"httpx", "msgspec"},
    "ckpt.handoff": {"httpx"},
    "ckpt.service": {"fastapi", "h11", "starlette", "uvicorn", "prometheus_client", "httpx"},
    "ckpt.storage.http_": {"httpx"},
    "ckpt.storage.s3_obstore": {"ConfigError: the obstore backend needs obstore"},
}
"""The modules that cannot be imported with the core alone, by prefix, and why not."""

pytestmark = pytest.mark.e2e


def example(root: str = "runs/first") -> str:
    """The README's, on another root if need be."""
    text = (ROOT / "README.md").read_text("utf-8")
    (found,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found.count('"runs/first"') == 1
    return str(found).replace('"runs/first"', json.dumps(root))


def distributions(*extras: str) -> set[str]:
    return set(needed([*PROJECT["dependencies"], *(t for e in extras for t in EXTRAS[e])], EXTRAS))


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    home = tmp_path_factory.mktemp("core") / "venv"
    return linked_environment(home, wheel, distributions())


@pytest.fixture(scope="module")
def cli(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    home = tmp_path_factory.mktemp("cli") / "venv"
    return linked_environment(home, wheel, distributions("cli"))


def say(where: Environment, cwd: Path, *calls: list[str]) -> list[tuple[int, str, str]]:
    """Status, output and errors of commands in an environment."""
    done = where.run(str(SUPPORT / "say.py"), json.dumps(calls), cwd=cwd)
    assert done.returncode == 0, done.stderr
    return [(status, out, err) for status, out, err in json.loads(done.stdout)]


@pytest.mark.s3
def test_the_core_alone_runs_the_example(core: Environment, tmp_path: Path, s3: S3Server) -> None:
    """Twice in a directory, so that it resumes, and once on S3; in one process, to be cheap."""
    (tmp_path / "here.py").write_text(example())
    (tmp_path / "there.py").write_text(example(s3.url("bare")))
    code = "import runpy, sys; [runpy.run_path(name) for name in sys.argv[1:]]"
    done = core.run("-c", code, "here.py", "here.py", "there.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "went from step 0 to 9",
        "went from step 10 to 19",
        "went from step 0 to 9",
    ]


def test_the_core_alone_imports_all_but_what_an_extra_is_for(
    core: Environment, tmp_path: Path
) -> None:
    done = core.run(str(SUPPORT / "import_all.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not {"numpy", "typer", "rich", "fastapi", "httpx"} & set(found["loaded"])
    odd = {
        name: why
        for name, why in found["stopped"].items()
        if not any(
            name.startswith(prefix) and any(why.startswith(reason) for reason in reasons)
            for prefix, reasons in NEED_AN_EXTRA.items()
        )
    }
    assert odd == {}
    assert len(found["stopped"]) > 30


def test_without_extras_commands_say_which_one(core: Environment, tmp_path: Path) -> None:
    for status, out, err in say(core, tmp_path, ["ckpt.cli", "ls", "."], ["archon_lora.cli"]):
        assert (status, out) == (2, "")
        assert re.fullmatch(r"[\w-]+: the command line needs typer: .*lora\[cli\]'\n", err)


def test_with_one_extra_commands_work_or_say_which_other(cli: Environment, tmp_path: Path) -> None:
    engine, version = "vllm+http://127.0.0.1:9", PROJECT["version"]
    lacking = {
        "service": ["ckpt.cli", "serve", "--root", "."],
        "handoff": ["ckpt.cli", "sync", ".", "--run", "a", "--engine", engine, "--cache", "c"],
        "client": ["ckpt.cli", "ls", "http://127.0.0.1:9/run"],
        "rl": ["archon_lora.cli", "make-tiny", "m"],
        "demo": ["archon_lora.cli", "demo"],
        "rl]'": ["archon_lora.cli", "train", str(ROOT / "examples" / "train.toml")],
    }
    working = [
        ["ckpt.cli", "--version"],
        ["archon_lora.cli", "--version"],
        ["ckpt.cli", "serve", "--help"],
        ["archon_lora.cli", "--help"],
    ]
    said = say(cli, tmp_path, *working, *lacking.values())
    assert said[0] == (0, f"ckpt {version}\n", "")
    assert said[1] == (0, f"archon-lora {version}\n", "")
    assert said[2][0] == said[3][0] == 0
    assert "--token-file" in said[2][1]
    assert "make-tiny" in said[3][1]
    for extra, (status, out, err) in zip(lacking, said[4:], strict=True):
        assert (status, out) == (2, ""), err
        assert err.count("\n") == 1, err
        assert re.search(rf"pip install 'archon-lora\[(cli,)?{re.escape(extra)}", err), err


def test_both_packages_tell_the_version() -> None:
    import archon_lora
    import ckpt

    installed = importlib.metadata.version("archon-lora")
    assert ckpt.__version__ == archon_lora.__version__ == installed


@pytest.mark.parametrize("lost", ["fastapi", "uvicorn", "prometheus-client", "h11", "jinja2"])
def test_the_service_names_what_it_lacks(
    wheel: Path, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each of its packages, also where the others are there (an upgrade gone wrong)."""
    from typer.testing import CliRunner

    from ckpt.cli_commands import app

    module = lost.replace("-", "_")
    for name in [n for n in sys.modules if n.startswith(("ckpt.service", module))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    done = CliRunner().invoke(app, ["serve", "--root", str(tmp_path)])
    assert done.exit_code == 2, done.output
    assert f"needs {module}" in done.stderr
    assert "archon-lora[cli,service]" in done.stderr


# -- with pip ------------------------------------------------------------------------------------

DOWNSTREAM = """
from typing import assert_type

from ckpt.handoff import Registry, Version


def resumed(manager: CheckpointManager, state: TrainState) -> int:
    start = manager.restore(state)
    assert_type(start, int | None)
    handle = manager.save(0, state, publish=True)
    assert_type(handle, SaveHandle)
    return 0 if start is None else start


def newest(root: str) -> Version | None:
    return Registry(root).latest()


config = LoRAConfig(rank=8, alpha=16, target_modules=["q_proj"])
resumed("not a manager", config)  # type: ignore[arg-type]
LoRAConfig(rank="8")  # type: ignore[arg-type]
"""
"""After the README's example: what a strict checker must infer, and two mistakes it must see."""


@pytest.fixture(scope="module")
def pip_environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which pip installed the wheel, and nothing that it does not ask for."""
    home = tmp_path_factory.mktemp("pip") / "venv"
    venv.create(home, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    environment = Environment(home, home / "lib" / version / "site-packages")
    # torch first and alone, at the exact version: see the Makefile.
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch is not None
    pip_install(environment, torch.group())
    pip_install(environment, str(wheel))
    return environment


def pip_install(where: Environment, *what: str) -> None:
    done = where.run(
        *("-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
        *("-c", str(ROOT / "constraints.txt"), *what),
        cwd=where.home,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    checked = where.run("-m", "pip", "check", cwd=where.home)
    assert checked.returncode == 0, checked.stdout


def script(where: Environment, *words: str, cwd: Path) -> tuple[int, str, str]:
    """Run a console script of an environment."""
    done = where.run(str(where.home / "bin" / words[0]), *words[1:], cwd=cwd)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(ASKED not in os.environ, reason="`make release` installs the wheel for itself")
def test_an_empty_environment(pip_environment: Environment, wheel: Path, tmp_path: Path) -> None:
    here, version = pip_environment, PROJECT["version"]
    (tmp_path / "example.py").write_text(example())
    for first in (0, 10):
        done = here.run("-W", "error::DeprecationWarning:ckpt", "example.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"went from step {first} to {first + 9}\n"

    for command in ("ckpt", "archon-lora"):
        status, _out, err = script(here, command, "--version", cwd=tmp_path)
        assert status == 2
        assert err.endswith("pip install 'archon-lora[cli]'\n")

    pip_install(here, f"{wheel}[cli]")
    for command in ("ckpt", "archon-lora"):
        status, out, err = script(here, command, "--version", cwd=tmp_path)
        assert (status, out) == (0, f"{command} {version}\n"), err
        status, out, err = script(here, command, "--help", cwd=tmp_path)
        assert status == 0, err
    status, out, err = script(here, "ckpt", "ls", "runs/first", cwd=tmp_path)
    assert status == 0, err
    assert "run-v00000004" in out
    status, _out, err = script(here, "ckpt", "serve", "--root", "runs/first", cwd=tmp_path)
    assert status == 2
    assert "archon-lora[cli,service]" in err

    pip_install(here, f"{wheel}[service,handoff]")
    status, out, err = script(here, "ckpt", "serve", "--help", cwd=tmp_path)
    assert status == 0, err
    assert "--token-file" in out
    assert "numpy" not in {path.name for path in here.site.iterdir()}


@pytest.mark.slow
@pytest.mark.skipif(ASKED not in os.environ, reason="`make release` installs the wheel for itself")
def test_a_project_that_uses_it_is_type_checked(
    pip_environment: Environment, tmp_path: Path
) -> None:
    source = example().replace("import CheckpointManager,", "import CheckpointManager, SaveHandle,")
    (tmp_path / "downstream.py").write_text(source + DOWNSTREAM)
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict", "--no-incremental"),
            *("--python-executable", pip_environment.python, "downstream.py"),
        ],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "MYPYPATH"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


# -- with the oldest versions --------------------------------------------------------------------

OLDEST = (
    *("fsspec", "s3fs", "safetensors", "typer", "rich", "httpx", "msgspec", "fastapi", "h11"),
    *("jinja2", "prometheus-client", "uvicorn", "obstore"),
)
"""Those that the commands, the stores and the service are made of; torch is the tested one."""
THEIR_OWN = ("aiobotocore==2.21.1", "botocore==1.37.1", "boto3==1.37.1")
"""What s3fs's oldest version works with, named so that pip need not search for it."""
TRIED = (
    "tests/contract/test_storage.py",
    *("tests/unit/ckpt/storage", "tests/unit/ckpt/client", "tests/unit/ckpt/test_peft.py"),
    *("tests/unit/ckpt/test_cli.py", "tests/unit/ckpt/test_cli_config.py"),
    *("tests/unit/ckpt/service/test_auth.py", "tests/unit/ckpt/service/test_runs.py"),
)


def lower_bounds() -> dict[str, str]:
    """The oldest version of every direct dependency, by name."""
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    found: dict[str, str] = {}
    for requirement in map(Requirement, texts):
        if canonical(requirement.name) != "archon-lora":
            (bound,) = requirement.specifier
            assert bound.operator in {">=", "=="}, requirement
            known = found.setdefault(canonical(requirement.name), bound.version)
            assert known == bound.version, f"{requirement.name} has two lower bounds"
    return found


def test_every_dependency_has_one_lower_bound() -> None:
    assert set(OLDEST) <= lower_bounds().keys()


@pytest.mark.slow
@pytest.mark.skipif(ASKED not in os.environ, reason="`make release` tries the oldest versions")
def test_the_oldest_versions_will_do(tmp_path: Path) -> None:
    bounds = lower_bounds()
    exact = [f"{name}=={bounds[name]}" for name in OLDEST]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--target", str(tmp_path / "oldest"), *exact, *THEIR_OWN),
        ],
        check=True,
        timeout=1200,
    )
    path = f"{tmp_path / 'oldest'}{os.pathsep}{ROOT}"
    code = "import importlib.metadata as m, sys; print(*map(m.version, sys.argv[1:]))"
    shown = subprocess.run(
        [sys.executable, "-c", code, "s3fs", "typer", "fastapi"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name, version in zip(("s3fs", "typer", "fastapi"), shown.split(), strict=True):
        assert Version(version) == Version(bounds[name])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            # s3fs of that time closes clients in tasks that nobody runs, when they are collected.
            *("-W", "ignore::pytest.PytestUnraisableExceptionWarning", *TRIED),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
