"""The container files agree with the project and with each other."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from archon_lora.rl.config import load_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def test_dockerfile_installs_torch_first_and_runs_as_a_user() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert text.index("'^torch=='") < text.index("'.[demo]'")
    assert text.rindex("USER trainer") > text.rindex("RUN ")
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), f"{name} is copied but not there"


def test_everything_that_is_copied_passes_the_ignore_file() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    copied = " ".join(re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)).split()
    admitted = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    assert sorted(copied) == sorted(admitted)


def test_compose_services_and_defaults() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    compose = yaml.safe_load(text)
    assert set(compose["services"]) == {"s3", "trainer"}
    assert compose["services"]["trainer"]["depends_on"]["s3"]["condition"] == "service_healthy"
    assert "healthcheck" in compose["services"]["s3"]
    assert not any("ports" in service for service in compose["services"].values())
    used = set(re.findall(r"\$\{(\w+):-([^}]*)\}", text))
    lines = (DOCKER / ".env.example").read_text(encoding="utf-8").splitlines()
    said = {tuple(line.split("=", 1)) for line in lines if line and not line.startswith("#")}
    assert used == said, "compose.yaml's defaults and .env.example differ"


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
