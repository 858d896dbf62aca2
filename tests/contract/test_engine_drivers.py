"""Both drivers against a server that answers as the real one did, its lies included."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from support.certificates import certificate
from support.engine_brains import EFFECT
from support.fake_engine import FakeEngine
from support.probed_versions import PROMPT, publish_for

from ckpt.errors import ConfigError
from ckpt.handoff import sglang
from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import AdapterRefused, Engine, EngineError, EngineUnreachable
from ckpt.handoff.probe import distance
from ckpt.handoff.registry import Registry

KEY = "key-of-these-tests"


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def server(request: pytest.FixtureRequest) -> Iterator[FakeEngine]:
    with FakeEngine(request.param, api_key=KEY) as engine:
        yield engine


@pytest.fixture
def engine(server: FakeEngine) -> Iterator[Engine]:
    driver = open_engine(server.address, api_key=KEY, timeout_s=5.0)
    yield driver
    driver.close()
    if not server.alive:
        server.restart()
    control(server)


def control(server: FakeEngine, *faults: dict[str, object]) -> None:
    server.faults(*faults)


@pytest.fixture
def adapter(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory of a name that no other test uses."""
    run = re.sub(r"[^A-Za-z0-9]+", "-", request.node.name)[:60].strip("-")
    version = publish_for(tmp_path / "root", run, 1, None)
    return Registry(tmp_path / "root").fetch(version, tmp_path / "cache")


def edit(directory: Path, **changes: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_is_an_engine(engine: Engine, server: FakeEngine):
    assert isinstance(engine, Engine)
    assert (engine.url, engine.kind) == (server.url, server.kind)
    engine.ready(5.0)


def test_load_answer_unload(engine: Engine, server: FakeEngine, adapter: Path):
    assert adapter.name not in engine.adapters()
    engine.load(adapter.name, str(adapter))
    assert engine.adapters()[adapter.name] == str(adapter)
    base, under = engine.logprobs(PROMPT, None), engine.logprobs(PROMPT, adapter.name)
    assert base == pytest.approx(server.expected(list(PROMPT), None))
    assert under == pytest.approx(server.expected(list(PROMPT), adapter))
    assert distance(base, under) > EFFECT / 4
    engine.unload(adapter.name)
    assert adapter.name not in engine.adapters()
    engine.unload(adapter.name)


def test_a_name_on_the_list_is_refused(engine: Engine, adapter: Path):
    engine.load(adapter.name, str(adapter))
    with pytest.raises(AdapterRefused, match=r"HTTP 400.*publish the next version") as caught:
        engine.load(adapter.name, str(adapter))
    assert caught.value.url == engine.url
    assert adapter.name in str(caught.value)


def test_a_directory_without_an_adapter_is_refused(engine: Engine, tmp_path: Path):
    with pytest.raises(AdapterRefused, match="ckpt lint"):
        engine.load("nothing-v00000001", str(tmp_path / "nothing-v00000001"))


def test_a_rank_above_the_limit_is_an_error(engine: Engine, adapter: Path):
    edit(adapter, r=64)
    with pytest.raises(EngineError, match=r"rank.*ckpt lint"):
        engine.load(adapter.name, str(adapter))
    assert adapter.name not in engine.adapters()


def test_an_adapter_that_matches_nothing(engine: Engine, tmp_path: Path, adapter: Path):
    """vLLM says 200 and serves the base; SGLang does not mind the prefix."""
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.model.layers", b"model.modal.layers"))
    engine.load(adapter.name, str(adapter))
    moved = distance(engine.logprobs(PROMPT, None), engine.logprobs(PROMPT, adapter.name))
    assert (moved == 0) is (engine.kind == "vllm")


def test_a_rank_that_lies_ends_sglang_at_first_use(
    engine: Engine, server: FakeEngine, adapter: Path
):
    edit(adapter, r=8)
    engine.load(adapter.name, str(adapter))
    if engine.kind == "vllm":
        engine.logprobs(PROMPT, adapter.name)
        return
    with pytest.raises(EngineUnreachable, match="no answer"):
        engine.logprobs(PROMPT, adapter.name)
    server.wait_for_end()


def test_after_an_unload(engine: Engine, adapter: Path):
    """vLLM forgets the name; SGLang reads the directory again, as it lies there then."""
    engine.load(adapter.name, str(adapter))
    before = engine.logprobs(PROMPT, adapter.name)
    engine.unload(adapter.name)
    if engine.kind == "vllm":
        with pytest.raises(EngineError, match="does not exist"):
            engine.logprobs(PROMPT, adapter.name)
        return
    edit(adapter, lora_alpha=99)
    assert distance(before, engine.logprobs(PROMPT, adapter.name)) > 0


def test_incarnation_changes_with_the_process_only(engine: Engine, server: FakeEngine):
    first = engine.incarnation()
    assert first is not None
    assert engine.incarnation() == first
    server.restart()
    assert engine.incarnation() not in (None, first)


def test_incarnation_may_be_unknown(engine: Engine, server: FakeEngine):
    control(server, {"at": "incarnation", "do": "error", "status": 404})
    assert engine.incarnation() is None


def test_reads_are_repeated_and_changes_are_not(engine: Engine, server: FakeEngine, adapter: Path):
    control(server, {"at": "models", "do": "drop", "times": 2})
    engine.adapters()
    control(server, {"at": "models", "do": "error", "status": 503, "times": 3})
    with pytest.raises(EngineError, match="HTTP 503"):
        engine.adapters()
    engine.adapters()
    control(server, {"at": "load", "do": "drop", "times": 1})
    with pytest.raises(EngineUnreachable):
        engine.load(adapter.name, str(adapter))
    path = "/v1/load_lora_adapter" if engine.kind == "vllm" else "/load_lora_adapter"
    tried = [item for item in server.requests(path) if item["body"]["lora_name"] == adapter.name]
    assert len(tried) == 1


def test_a_hang_ends_at_the_deadline(server: FakeEngine, engine: Engine):
    control(server, {"at": "generate", "do": "hang", "seconds": 20, "times": 1})
    quick = open_engine(server.address, api_key=KEY, timeout_s=0.5)
    began = time.monotonic()
    with pytest.raises(EngineUnreachable, match=r"no answer within 0\.5 s"):
        quick.logprobs(PROMPT, None)
    quick.close()
    assert time.monotonic() - began < 5


def test_ready_waits_and_gives_up(server: FakeEngine, engine: Engine):
    control(server, {"at": "health", "do": "error", "status": 503, "times": 2})
    engine.ready(10.0)
    control(server, {"at": "health", "do": "error", "status": 503})
    began = time.monotonic()
    with pytest.raises(EngineError, match="HTTP 503"):
        engine.ready(0.5)
    assert time.monotonic() - began < 3


def test_a_wrong_key_is_an_error_at_once_and_never_shown(server: FakeEngine, engine: Engine):
    wrong = open_engine(server.address, api_key="wrong-key-of-tests", timeout_s=5.0)
    try:
        with pytest.raises(EngineError, match=r"401.*key") as caught:
            wrong.ready(60.0)
        assert "wrong-key-of-tests" not in str(caught.value) + repr(wrong)
    finally:
        wrong.close()


def test_an_echoed_key_is_blotted_out(tmp_path: Path):
    """A proxy may put the request into its error page."""
    page = b"HTTP/1.1 418 no\r\nConnection: close\r\n\r\nyou sent Bearer " + KEY.encode()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, page))
        thread.start()
        driver = open_engine(f"vllm+http://127.0.0.1:{listener.getsockname()[1]}", api_key=KEY)
        try:
            with pytest.raises(EngineError, match=r"418.*\*\*\*") as caught:
                driver.adapters()
            assert KEY not in str(caught.value)
        finally:
            driver.close()
            thread.join()


def test_an_answer_that_drips_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()
        thread = threading.Thread(target=_drip, args=(listener, stop))
        thread.start()
        driver = open_engine(f"vllm+http://127.0.0.1:{listener.getsockname()[1]}", timeout_s=0.6)
        began = time.monotonic()
        try:
            with pytest.raises(EngineUnreachable, match="within"):
                driver.adapters()
            assert time.monotonic() - began < 5
        finally:
            stop.set()
            driver.close()
            thread.join()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_answers_of_something_else_are_errors(kind: str):
    for page in (b"<html>hello</html>", b"[]", b'{"data": [{"id": 7}]}'):
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        with socket.create_server(("127.0.0.1", 0)) as listener:
            thread = threading.Thread(target=_answer, args=(listener, head + page))
            thread.start()
            driver = open_engine(f"{kind}+http://127.0.0.1:{listener.getsockname()[1]}")
            with pytest.raises(EngineError, match=r"(address|version)"):
                driver.adapters()
            driver.close()
            thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "http://127.0.0.1:8000",
        "tgi+http://127.0.0.1:8000",
        "vllm+ftp://127.0.0.1",
        "vllm+http://",
        "vllm+http://user:secret-word@127.0.0.1:8000",
        "sglang+http://127.0.0.1:8000/?key=secret-word",
        "secret-word",
        "vllm+http://127.0.0.1:99999",
    ],
)
def test_addresses_that_cannot_be(address: str):
    with pytest.raises(ConfigError, match="address") as caught:
        open_engine(address)
    assert address == "secret-word" or "secret-word" not in str(caught.value)


def test_times_that_cannot_be():
    for timeout_s in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="timeout_s"):
            open_engine("vllm+http://127.0.0.1:8000", timeout_s=timeout_s)


def test_sglang_forgets_the_least_recently_used_without_a_word(tmp_path: Path):
    """Why the hand-over counts slots itself."""
    with FakeEngine("sglang", max_loaded=2) as server:
        driver = open_engine(server.address)
        names = []
        for seed in range(3):
            version = publish_for(tmp_path / "root", "full", seed, None)
            path = Registry(tmp_path / "root").fetch(version, tmp_path / "cache")
            driver.load(version.name, str(path))
            names.append(version.name)
        assert sorted(driver.adapters()) == names[1:]
        shutil.rmtree(tmp_path / "cache" / names[0])
        with pytest.raises(EngineError):
            driver.logprobs(PROMPT, names[0])
        driver.close()


def _answer(listener: socket.socket, page: bytes) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(page)


def _drip(listener: socket.socket, stop: threading.Event) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        try:
            while not stop.wait(0.1):
                connection.sendall(b"x")
        except OSError:
            return


def test_an_unload_that_waits_for_requests_does_not_hold_the_driver_up(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sglang, "UNLOAD_S", 0.3)
    with FakeEngine("sglang") as server:
        engine = open_engine(server.address, timeout_s=20.0)
        engine.load(adapter.name, str(adapter))
        slow = {"at": "unload", "do": "hang", "seconds": 4, "times": 1}
        server.faults({**slow, "after": True})  # off the list, and requests under way
        began = time.monotonic()
        engine.unload(adapter.name)
        assert time.monotonic() - began < 3
        assert adapter.name not in engine.adapters()
        engine.load(adapter.name, str(adapter))
        server.faults(slow)  # not even begun: nothing can be said
        with pytest.raises(EngineUnreachable, match=r"no answer within 0\.3 s"):
            engine.unload(adapter.name)
        engine.close()


def test_an_https_replica_is_trusted_as_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nobody wants to know."""

    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        server.socket = certificate(tmp_path).wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"vllm+https://127.0.0.1:{server.server_port}"
        stranger = open_engine(address)
        with pytest.raises(EngineUnreachable, match="CERTIFICATE_VERIFY_FAILED"):
            stranger.ready(0.1)
        stranger.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        engine = open_engine(address)
        engine.ready(5.0)
        engine.close()
        server.shutdown()
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="SSL_CERT_FILE"):
        open_engine(address)
