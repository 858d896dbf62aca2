"""What every command says and returns when it goes wrong: one table over all there are."""

from __future__ import annotations

import errno
import json
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from support.publishers import two_steps_and_a_version
from support.s3_server import S3Server
from typer.testing import CliRunner, Result

from ckpt import cli_console
from ckpt.cli_commands import app
from ckpt.errors import DamagedError, PublishError, StorageError
from ckpt.tier import Tier

VERSION = "run7-v00000001"
SECRET = "wJalrXUtnFEMI-K7MDENG"
QUICKLY = 20.0
"""Seconds; what repeats for as long as a transfer may takes minutes."""


@dataclass(frozen=True)
class Row:
    """How a command is called, and which statuses its errors have.

    Attributes:
        call: its arguments; ``{root}`` is what must be there.
        waits: it takes a root that is not there yet, or does not answer, for one that will be.
        no_step: arguments that name a step that there is not.
        damaged: arguments for a step whose bytes are damaged, and the status.
    """

    call: tuple[str, ...]
    waits: bool = False
    no_step: tuple[str, ...] | None = None
    damaged: tuple[tuple[str, ...], int] | None = None


EXPORT = Row(
    ("{root}", "{tmp}/out"),
    no_step=("{root}", "{tmp}/out", "--step", "99"),
    damaged=(("{root}", "{tmp}/out"), 1),
)
SIDECAR = ("--run", "run7", "--engine", "vllm+http://127.0.0.1:1", "--cache", "{tmp}/cache")
COMMANDS = {
    "ls": Row(("{root}",)),
    "inspect": Row(("{root}",), no_step=("{root}", "--step", "99")),
    "verify": Row(
        ("{root}",), no_step=("{root}", "--step", "99"), damaged=(("{root}", "--step", "20"), 1)
    ),
    "export": EXPORT,
    "consolidate": EXPORT,
    "import": Row(("{root}", "{tmp}/new")),
    "lint": Row(("{root}",)),
    "versions": Row(("{root}",)),
    "publish": Row(
        ("{root}",), no_step=("{root}", "--step", "99"), damaged=(("{root}", "--step", "20"), 1)
    ),
    "prune": Row(("{root}", "--keep-latest", "1")),
    "pin": Row(("{root}", "--step", "10"), no_step=("{root}", "--step", "99")),
    "unpin": Row(("{root}", "--step", "10"), no_step=("{root}", "--step", "99")),
    "mirror": Row(("{root}", "{tier}")),
    "diff": Row(
        ("{root}", "10", "20"),
        no_step=("{root}", "10", "99"),
        damaged=(("{root}", "10", "20"), 1),
    ),
    "doctor": Row(("{root}",)),
    "serve": Row(("--root", "{root}", "--listen", "nowhere"), waits=True),
    "sync": Row(("{root}", *SIDECAR, "--listen", "nowhere"), waits=True),
}
EACH = sorted(COMMANDS)
ASKING = [name for name in EACH if not COMMANDS[name].waits]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_steps_and_a_version(tmp_path / "root")


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """An address of this machine that refuses connections, and credentials for it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("CKPT_TOKEN", SECRET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def run(name: str, call: tuple[str, ...], *more: str, **places: object) -> Result:
    places.setdefault("tier", places.get("tmp"))
    filled = [part.format(**places) for part in call]
    return CliRunner().invoke(app, [name, *filled, *more])


def refused(result: Result, status: int, *said: str, as_json: bool = False) -> None:
    """One line on standard error that says all of that, and nothing beside it."""
    assert result.exit_code == status, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("ckpt: ")
    for text in said:
        assert text in line
    assert SECRET not in result.output
    assert "Traceback" not in result.output
    if as_json:
        error = json.loads(result.stdout)["error"]
        assert error["type"]
        assert f"ckpt: {error['message']}" == line
    else:
        assert result.stdout == ""


def test_no_command_is_forgotten() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    assert set(commands) == set(COMMANDS)


@pytest.mark.parametrize("name", EACH)
def test_help_says_what_the_statuses_mean(name: str) -> None:
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    assert " ".join(cli_console.EXIT_STATUS.split()) in " ".join(result.stdout.split())
    assert "--json" in result.stdout
    assert "AS_JSON" not in result.stdout  # a variable that asked for it would break scripts


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_wrong_option(name: str, as_json: bool) -> None:
    more = ["--json"] if as_json else []
    result = CliRunner().invoke(app, [name, "--no-such-option", *more])
    refused(result, 2, "--no-such-option", f"`ckpt {name} --help`", as_json=as_json)


@pytest.mark.parametrize("name", [name for name in EACH if COMMANDS[name].call])
def test_a_missing_argument(name: str) -> None:
    refused(CliRunner().invoke(app, [name]), 2, "Missing ", f"`ckpt {name} --help`")


def test_a_command_that_there_is_not() -> None:
    refused(CliRunner().invoke(app, ["verfy", "x"]), 2, "'verfy'", "verify", "`ckpt --help`")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_a_configuration_file_that_is_not_there(as_json: bool) -> None:
    more = ["--json"] if as_json else []
    result = CliRunner().invoke(app, ["--config", "none.toml", "ls", "x", *more])
    refused(result, 2, "none.toml", "--config", as_json=as_json)


def test_a_variable_does_not_ask_for_json(root: Path) -> None:
    result = CliRunner().invoke(app, ["ls", str(root)], env={"CKPT_LS_AS_JSON": "1"})
    assert result.stdout.startswith("steps")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", [name for name in ASKING if name != "mirror"])
def test_a_root_that_is_not_there(name: str, as_json: bool, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    result = run(name, COMMANDS[name].call, *["--json"] * as_json, root=gone, tmp=tmp_path)
    refused(result, 3, "no such directory", str(gone), "check the path", as_json=as_json)
    assert not gone.exists()


@pytest.mark.parametrize("name", [name for name in ASKING if name != "mirror"])
def test_a_root_that_is_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    result = run(name, COMMANDS[name].call, root=file, tmp=tmp_path)
    if name == "import":  # which may well be one
        refused(result, 2, str(file))
    else:
        refused(result, 3, f"{file} is no directory")


@pytest.mark.parametrize("name", [name for name in ASKING if name != "mirror"])
def test_a_root_that_may_not_be_looked_at(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        if path == closed:  # as the system does below a directory without its x bit
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    result = run(name, COMMANDS[name].call, root=closed, tmp=tmp_path)
    refused(result, 3, f"{closed}: Permission denied", "permissions")


@pytest.mark.parametrize(("name", "as_json"), [*((name, False) for name in ASKING), ("ls", True)])
def test_an_s3_endpoint_that_refuses_connections(
    name: str, as_json: bool, nowhere: str, tmp_path: Path
) -> None:
    Tier(tmp_path / "tier", "s3://bucket/run7")
    places = {"root": "s3://bucket/run7", "tmp": tmp_path, "tier": tmp_path / "tier"}
    more = ["--endpoint-url", f"http://{nowhere}", *["--json"] * as_json]
    began = time.monotonic()
    result = run(name, COMMANDS[name].call, *more, **places)
    assert time.monotonic() - began < QUICKLY
    if name == "doctor":  # what it found is its output
        assert "failed  list" in result.stdout
        result = Told(result.exit_code, result.stderr)  # type: ignore[assignment]  # the rest of it
    refused(result, 3, "s3://bucket/run7", nowhere, "--endpoint-url", as_json=as_json)


@dataclass(frozen=True)
class Told:
    """A result without its standard output."""

    exit_code: int
    stderr: str
    stdout: str = ""

    @property
    def output(self) -> str:
        return self.stderr


def test_doctor_says_as_json_that_nobody_answers(nowhere: str) -> None:
    call = ["doctor", "s3://bucket/run7", "--json", "--endpoint-url", f"http://{nowhere}"]
    result = CliRunner().invoke(app, call)
    assert result.exit_code == 3
    shown = json.loads(result.stdout)
    assert shown["ok"] is False
    assert [check["name"] for check in shown["checks"]] == ["list"]


def test_an_endpoint_that_takes_connections_and_never_answers(
    nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli_console._S3["retry"], "seconds", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = time.monotonic()
        call = ["ls", "s3://bucket/run7", "--endpoint-url", f"http://127.0.0.1:{port}"]
        result = CliRunner().invoke(app, call)
        assert time.monotonic() - began < QUICKLY
    refused(result, 3, "s3://bucket/run7", "no answer in time", "--endpoint-url")


@pytest.mark.s3
def test_a_bucket_that_there_is_not(s3: S3Server) -> None:
    result = CliRunner().invoke(app, ["ls", "s3://no-such-bucket-at-all/x"])
    refused(result, 3, "NoSuchBucket", f"asked at {s3.endpoint_url}", "create the bucket")


@pytest.mark.parametrize(
    ("endpoint", "said"),
    [
        ("localhost:9000", "got 'localhost:9000'"),
        ("", "http://host[:port]"),
        (f"http://me:{SECRET}@127.0.0.1:9000", "must hold no credentials"),
    ],
)
def test_an_endpoint_that_is_no_address(endpoint: str, said: str, nowhere: str) -> None:
    call = ["ls", "s3://bucket/run7", "--endpoint-url", endpoint]
    refused(CliRunner().invoke(app, call), 2, "--endpoint-url", said)


def test_a_service_that_refuses_connections(nowhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli_console._SERVICE, "timeout_s", 0.3)
    began = time.monotonic()
    result = CliRunner().invoke(app, ["ls", f"http://{nowhere}/runs/run7"])
    assert time.monotonic() - began < QUICKLY
    refused(result, 3, nowhere, "does not answer", "check that a service runs", "CKPT_TOKEN")


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("name", [name for name in EACH if COMMANDS[name].no_step])
def test_a_step_that_there_is_not(name: str, as_json: bool, root: Path, tmp_path: Path) -> None:
    row = COMMANDS[name]
    assert row.no_step is not None
    result = run(name, row.no_step, *["--json"] * as_json, root=root, tmp=tmp_path)
    remedy = "`ckpt prune --dry-run`" if name == "unpin" else None
    said = ["99", str(root), *([remedy] if remedy else [])]
    refused(result, 2, *said, as_json=as_json)


def test_every_command_with_a_step_is_asked_for_one_that_there_is_not() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    takes = {
        name
        for name, command in commands.items()
        if any("--step" in parameter.opts for parameter in command.params)
    }
    assert takes - {"import"} == {n for n in EACH if COMMANDS[n].no_step} - {"diff"}


@pytest.mark.parametrize("name", [name for name in EACH if COMMANDS[name].damaged])
def test_a_damaged_step(name: str, root: Path, tmp_path: Path) -> None:
    damaged = COMMANDS[name].damaged
    assert damaged is not None
    shard = root / "steps" / "step-00000020.w0001" / "shard-00000-of-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 8
    shard.write_bytes(data)
    result = run(name, damaged[0], root=root, tmp=tmp_path)
    assert result.exit_code == damaged[1] == 1
    if name == "verify":
        assert shard.name in result.stdout
    else:
        refused(result, 1, str(shard), "CRC32 is ", "the manifest says ", "`ckpt verify`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["serve", "sync"])
@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_what_goes_on_for_long_refuses_too(name: str, as_json: bool, tmp_path: Path) -> None:
    call = COMMANDS[name].call
    result = run(name, call, *["--json"] * as_json, root=tmp_path / "gone", tmp=tmp_path)
    refused(result, 2, "--listen", "'nowhere'", as_json=as_json)
    assert result.stdout.count("\n") == as_json


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StorageError("s3://b/x: put failed"), 3, "--endpoint-url"),
        (StorageError("s3://b/x: put failed: HTTP 403 AccessDenied"), 3, "AWS_PROFILE"),
        (StorageError("s3://b/x: no answer in time"), 3, "that a server runs there"),
        (StorageError("https://h/runs/x: HTTP 502"), 3, "that a service runs"),
        (StorageError("gs://b/x: put failed"), 3, "credentials of its store"),
        (StorageError("/data/x: write failed: disk full"), 3, "the space on its disk"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 3, "/data/x: No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "a\nb"), 3, "check the path"),
        (DamagedError("x: damaged"), 1, "`ckpt verify`"),
    ],
)
def test_statuses_and_remedies(
    error: Exception, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(typer.Exit) as stop, cli_console.reported(as_json=True):
        raise error
    assert stop.value.exit_code == status
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1
    assert json.loads(output.out)["error"]["message"] in output.err


def test_a_publish_that_fails_has_the_status_of_its_cause(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(typer.Exit) as stop, cli_console.reported(as_json=False):
        raise PublishError("not published: s3://b/x: put failed") from StorageError("s3://b/x: …")
    assert stop.value.exit_code == 3
    assert "--endpoint-url" in capsys.readouterr().err


def test_a_bug_is_not_made_to_look_like_an_error_of_the_users() -> None:
    with pytest.raises(ZeroDivisionError), cli_console.reported(as_json=False):
        raise ZeroDivisionError


def test_nobody_reads_the_output_any_more() -> None:
    with pytest.raises(BrokenPipeError), cli_console.reported(as_json=False):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_role_that_may_not_list_everything_is_let_through(
    nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store:
        def list(self, _path: str) -> None:
            raise StorageError("s3://bucket/run7/writers: list failed: HTTP 403 AccessDenied: no")

        def close(self) -> None:
            pass

    monkeypatch.setattr(cli_console, "open_storage", lambda *_: Store())
    cli_console.ask("s3://bucket/run7", None)
