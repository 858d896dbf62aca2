"""The container files agree with the project and with each other."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import typer
import yaml

from archon_lora.rl.config import load_config
from ckpt.cli_commands import app

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


FILES = ("Dockerfile", "engine.Dockerfile")


def read(name: str) -> str:
    return (DOCKER / name).read_text(encoding="utf-8")


def copied(name: str) -> set[str]:
    found = re.findall(r"^COPY (?!--from)(.+) \S+$", read(name), re.MULTILINE)
    return set(" ".join(found).split())


def test_dockerfile_installs_torch_first_and_its_images_run_as_a_user() -> None:
    text = read("Dockerfile")
    for extra in ("'.[demo,handoff]'", "'.[service,handoff,obstore]'"):
        assert text.index("'^torch=='") < text.index(extra)
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[-2:]:
        assert "USER 10001" in stage
        assert stage.index("USER 10001") > stage.rindex("RUN ")


def test_everything_that_is_copied_is_there_and_passes_the_ignore_file() -> None:
    every = set().union(*(copied(name) for name in FILES))
    admitted = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert every == set(admitted)
    for name in every:
        assert (ROOT / name).exists(), f"{name} is copied but not there"


def options(command: str) -> set[str]:
    group = typer.main.get_command(app)
    return {text for parameter in group.commands[command].params for text in parameter.opts}  # type: ignore[attr-defined]


def check_arguments(arguments: list[str]) -> None:
    """The command is one of ckpt's, and knows every option that it is given."""
    command, *rest = arguments
    for argument in rest:
        if argument.startswith("--"):
            assert argument.partition("=")[0] in options(command), argument


def test_the_region_reaches_whoever_asks_s3() -> None:
    """botocore, and so s3fs, reads AWS_DEFAULT_REGION and not AWS_REGION."""
    store = yaml.safe_load(read("compose.yaml"))["x-store"]
    assert store["AWS_DEFAULT_REGION"] == "${S3_REGION:-us-east-1}"
    assert "AWS_REGION" not in read("compose.yaml") + read("kubernetes.yaml")
    variable = {"AWS_DEFAULT_REGION": "eu-central-1"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    code = "import botocore.session as s; print(s.Session().get_config_variable('region'))"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **variable, "AWS_CONFIG_FILE": os.devnull},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout == "eu-central-1\n"


def test_compose_services_and_defaults() -> None:
    text = read("compose.yaml")
    services = yaml.safe_load(text)["services"]
    assert set(services) == {"s3", "trainer", "service", "engine", "sidecar"}
    for name in ("trainer", "service"):
        assert services[name]["depends_on"]["s3"]["condition"] == "service_healthy"
    assert "healthcheck" in services["s3"]
    for name, service in services.items():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network: {port}"
    for name in ("service", "sidecar"):
        check_arguments(services[name]["command"])
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    used = set(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    lines = read(".env.example").splitlines()
    said = {tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")}
    assert used == said, "compose.yaml's defaults and .env.example differ"


def asked_path(path: str, port: int) -> int:
    """Status of the health check that asks for a path."""
    check = [sys.executable, str(DOCKER / "healthy.py"), path]
    environment = {**os.environ, "HEALTH_PORT": str(port)}
    return subprocess.run(
        check, env=environment, capture_output=True, timeout=60, check=False
    ).returncode


class _Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.headers.get("Authorization") == "Bearer long-enough-secret"
        known = known or self.path == "/readyz"
        self.send_response(200 if known else 401)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("tokens", "status"),
    [("# ours\nread long-enough-secret me\n", 0), ("long-enough-secret\n", 0), ("wrong\n", 1)],
)
def test_the_health_check_shows_its_token(tmp_path: Path, tokens: str, status: int) -> None:
    (tmp_path / "tokens").write_text(tokens)
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {"HEALTH_PORT": str(port), "TOKEN_FILE": str(tmp_path / "tokens")}
        check = [sys.executable, str(DOCKER / "healthy.py")]
        asked = subprocess.run(
            check, env={**os.environ, **environment}, capture_output=True, timeout=60, check=False
        )
        server.shutdown()
    assert asked.returncode == status, asked.stderr
    assert b"secret" not in asked.stderr


def test_the_health_check_asks_another_path() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert asked_path("/readyz", port) == 0
        assert asked_path("/healthz", port) == 1
        server.shutdown()


def test_run_settings_are_valid() -> None:
    config = load_config(DOCKER / "run.toml", ["checkpoint.root=s3://runs/first"])
    assert config.checkpoint.root == "s3://runs/first"
    assert config.model.path == "model"


@pytest.mark.s3
def test_s3_server_makes_its_bucket_and_stops_on_sigterm() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, str(DOCKER / "s3_server.py"), "some-bucket"],
        env={**os.environ, "S3_PORT": str(port)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        head = urllib.request.Request(f"http://127.0.0.1:{port}/some-bucket", method="HEAD")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the bucket did not appear"
            try:
                with direct.open(head, timeout=5) as answer:
                    assert answer.status == 200
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
