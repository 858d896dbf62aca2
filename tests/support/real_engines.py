"""What both real engines have to do with the hand-over: a suite, and where its servers come from.

The environment says where, and without it the tests are skipped (``X`` is VLLM or SGLANG):

- ``CKPT_TEST_ENGINE_MODEL``: a tiny Qwen2, from ``archon-lora make-tiny DIR --hidden 128``;
- ``CKPT_TEST_X_URL``: a server on this machine that serves it, started with slots for 4 adapters;
- or ``CKPT_TEST_X_START``: a command that starts one for ``MODEL`` on 127.0.0.1, port ``PORT``,
  both from its environment. Then the test that needs a restart runs, too.

``docs/engines.md`` has the commands.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from archon_lora.adapter import get_adapter_state_dict
from archon_lora.apply import apply_lora
from archon_lora.config import LoRAConfig
from archon_lora.models import load_pretrained
from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import AdapterRefused, Engine, EngineError
from ckpt.handoff.handover import Handover
from ckpt.handoff.probe import Probe, distance
from ckpt.handoff.registry import Registry, Version
from ckpt.handoff.report import HandoverReport
from ckpt.layout import new_attempt
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.train_state import export_of

MODEL = "CKPT_TEST_ENGINE_MODEL"
START_SECONDS = 300
PROMPT = (11, 45, 3, 60, 22, 9, 71, 34, 5, 18, 50, 27)
HOLDER = "compat-tests"
SLOTS = 4


class Trainer:
    """The Archon model with LoRA over the directory that the engine serves."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.model, names = load_pretrained(directory)
        for tensor in self.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())  # the engines' base
        apply_lora(self.model, LoRAConfig(rank=8, alpha=16.0), name_map=names.module_to_hf)
        self.export = export_of(self.model.adapter_export(base_model_name=directory))

    def draw(self, seed: int, std: float = 0.15) -> None:
        """Other adapter weights."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in get_adapter_state_dict(self.model).values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def logprobs(self, ids: Sequence[int], *, base: bool = False) -> tuple[float, ...]:
        from archon_lora.adapter import adapters_disabled

        with torch.no_grad(), adapters_disabled(self.model) if base else contextlib.nullcontext():
            rows = torch.log_softmax(self.model(torch.tensor([list(ids)]))[0].float(), -1)
        return tuple(float(rows[i, token]) for i, token in enumerate(ids[1:]))

    def publish(self, root: str, run: str, *, probe: bool = True) -> Version:
        recorded = Probe(PROMPT, self.logprobs(PROMPT), self.logprobs(PROMPT, base=True))
        manifest = publish_version(
            open_storage(root),
            run=run,
            export=self.export,
            source=MemorySource(get_adapter_state_dict(self.model)),
            step=None,
            policy_version=None,
            epoch=1,
            attempt=new_attempt(),
            base=None,
            probe=recorded.to_dict() if probe else None,
        )
        return Registry(root).get(manifest.name)


class Server:
    """A real server: one that runs already, or one that is started and ended here."""

    def __init__(self, kind: str, url: str | None, command: str | None) -> None:
        self.kind, self._command = kind, command
        self._process: subprocess.Popen[bytes] | None = None
        if url is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.url = url.rstrip("/")
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the server

    def start(self) -> None:
        if self._command is None:
            return
        self._process = subprocess.Popen(
            shlex.split(self._command),
            env={**os.environ, "PORT": self.url.rpartition(":")[2], "MODEL": os.environ[MODEL]},
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready(self) -> None:
        with contextlib.closing(open_engine(f"{self.kind}+{self.url}")) as engine:
            engine.ready(START_SECONDS)
            deadline = time.monotonic() + START_SECONDS
            while True:  # SGLang says that it is healthy before it answers
                try:
                    engine.logprobs(PROMPT, None)
                    return
                except EngineError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)

    def signal(self, number: int) -> None:
        """Send a signal to all its processes."""
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=60)
            self._process = None

    def generate(self, ids: Sequence[int], name: str, count: int) -> tuple[list[int], list[float]]:
        """Greedy tokens and their log-probabilities."""
        if self.kind == "vllm":
            body: dict[str, Any] = {
                "model": name,
                "prompt": list(ids),
                "max_tokens": count,
                "temperature": 0.0,
                "logprobs": 1,
                "return_token_ids": True,
                "ignore_eos": True,
            }
            answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).json()
            choice = answer["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]
        body = {
            "input_ids": list(ids),
            "lora_path": name,
            "sampling_params": {"max_new_tokens": count, "temperature": 0.0, "ignore_eos": True},
            "return_logprob": True,
        }
        answer = httpx.post(f"{self.url}/generate", json=body, timeout=60).json()
        told = answer["meta_info"]["output_token_logprobs"]
        return answer["output_ids"], [item[0] for item in told]


def server_of(kind: str) -> Iterator[Server]:
    """The server of one kind; skips where the environment names none."""
    url = os.environ.get(f"CKPT_TEST_{kind.upper()}_URL")
    command = os.environ.get(f"CKPT_TEST_{kind.upper()}_START")
    if (url is None and command is None) or MODEL not in os.environ:
        pytest.skip(
            f"set {MODEL} and CKPT_TEST_{kind.upper()}_URL or ..._START for a real server "
            "(docs/engines.md)"
        )
    server = Server(kind, url, None if url is not None else command)
    server.start()
    try:
        server.ready()
        yield server
    finally:
        server.kill()
        server.log.close()


class EngineSuite:
    """Tests of one engine; a subclass names it and has the fixture ``server``."""

    kind: str

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls) -> Iterator[Server]:
        yield from server_of(cls.kind)

    @pytest.fixture(scope="class")
    @classmethod
    def trainer(cls, server: Server) -> Trainer:
        return Trainer(os.environ[MODEL])

    @pytest.fixture
    def engine(self, server: Server) -> Iterator[Engine]:
        with contextlib.closing(open_engine(f"{self.kind}+{server.url}")) as engine:
            for name in engine.adapters():
                engine.unload(name)
            yield engine

    @pytest.fixture
    def run_name(self) -> str:
        """A run's name that this server has never seen."""
        return f"run-{new_attempt()[:10]}"

    def test_twenty_versions_follow_each_other(
        self,
        engine: Engine,
        server: Server,
        trainer: Trainer,
        run_name: str,
        tmp_path: Path,
        record_property: Any,
    ):
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=2, registry=registry)
        reports: list[HandoverReport] = []
        for seed in range(20):
            trainer.draw(seed)
            version = trainer.publish(root, run_name)
            report = handover.make_live(version, registry.fetch(version, tmp_path / "cache"))
            report.raise_if_failed()
            reports.append(report)
            handover.unload_unused()
            assert list(engine.adapters()) == [version.name]
        replicas = [report.replicas[0] for report in reports]
        figures = {
            "load_ms": statistics.median(item.load_ms for item in replicas),
            "proof_ms": statistics.median(item.proof_ms for item in replicas),
            "total_ms": statistics.median(report.total_ms for report in reports),
            "off_max": max(item.evidence.off for item in replicas),
            "moved_min": min(item.evidence.moved for item in replicas),
            "noise_max": max(item.evidence.noise for item in replicas),
        }
        record_property(self.kind, figures)
        print(self.kind, {name: round(value, 4) for name, value in figures.items()})
        assert all(item.evidence.by == "expected" for item in replicas)
        assert figures["moved_min"] > 2 * figures["off_max"]

    def test_another_versions_answer_is_no_proof(
        self, engine: Engine, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=SLOTS, registry=registry, retries=0)
        trainer.draw(1)
        right = trainer.publish(root, run_name)
        handover.make_live(right, registry.fetch(right, tmp_path / "cache")).raise_if_failed()
        trainer.draw(2)
        other = replace(trainer.publish(root, run_name), probe=right.probe)
        report = handover.make_live(other, registry.fetch(other.name, tmp_path / "cache"))
        assert not report.live
        assert "serves something else" in report.explain()
        assert handover.current == right
        assert list(engine.adapters()) == [right.name]

    def test_a_zero_adapter_without_a_record(
        self, engine: Engine, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=SLOTS, registry=registry, retries=0)
        found = []
        for std in (0.0, 0.15):
            trainer.draw(3, std)
            version = trainer.publish(root, run_name, probe=False)
            report = handover.make_live(version, registry.fetch(version, tmp_path / "cache"))
            report.raise_if_failed()
            found.append(report.replicas[0].evidence.by)
        assert found == ["no effect", "difference"]

    def test_keys_that_match_nothing(
        self, engine: Engine, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        """vLLM answers 200 and serves the base; SGLang looks at the layer's number alone."""
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=SLOTS, registry=registry, retries=0)
        trainer.draw(4)
        version = trainer.publish(root, run_name)
        path = registry.fetch(version, tmp_path / "cache")
        weights = path / "adapter_model.safetensors"
        spoilt = weights.read_bytes().replace(b"model.model.layers", b"model.modal.layers")
        weights.write_bytes(spoilt)
        report = handover.make_live(version, path)
        assert report.live is (self.kind == "sglang")
        if self.kind == "vllm":
            assert "serves the base model under this name" in report.explain()

    def test_a_name_is_never_loaded_twice(
        self, engine: Engine, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        root = str(tmp_path / "root")
        registry = Registry(root)
        trainer.draw(5)
        version = trainer.publish(root, run_name)
        path = registry.fetch(version, tmp_path / "cache")
        Handover([engine], holder=HOLDER).make_live(version, path).raise_if_failed()
        with pytest.raises(AdapterRefused, match="publish the next version"):
            engine.load(version.name, str(path))
        copy = registry.fetch(version, tmp_path / "elsewhere")
        report = Handover([engine], holder=HOLDER, retries=0).make_live(version, copy)
        assert not report.live
        assert f"stands for {path}" in report.explain()

    def test_full_slots_are_refused_and_nothing_is_pushed_out(
        self, engine: Engine, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=SLOTS, registry=registry)
        versions: list[Version] = []
        for seed in range(SLOTS + 1):
            trainer.draw(seed)
            version = trainer.publish(root, run_name)
            registry.lease(version, "rollouts", 60.0)
            report = handover.make_live(version, registry.fetch(version, tmp_path / "cache"))
            versions.append(version)
            assert report.live is (seed < SLOTS)
        assert "slots are taken" in report.explain()
        assert sorted(engine.adapters()) == [item.name for item in versions[:-1]]
        for item in versions[:-1]:
            answer = engine.logprobs(PROMPT, item.name)
            assert distance(answer, item.probe.logprobs) <= item.probe.tolerance
        registry.release(versions[0], "rollouts")
        handover.make_live(version, tmp_path / "cache" / version.name).raise_if_failed()

    def test_the_same_tokens_as_peft(
        self, engine: Engine, server: Server, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        """Eight greedy tokens where PEFT is sure of each, and their log-probabilities."""
        peft = pytest.importorskip("peft")
        transformers = pytest.importorskip("transformers")
        root = str(tmp_path / "root")
        registry = Registry(root)
        trainer.draw(6)
        version = trainer.publish(root, run_name)
        path = registry.fetch(version, tmp_path / "cache")
        Handover([engine], holder=HOLDER).make_live(version, path).raise_if_failed()
        base = transformers.AutoModelForCausalLM.from_pretrained(
            os.environ[MODEL], dtype=torch.bfloat16
        )
        model = peft.PeftModel.from_pretrained(base.float(), path).eval()
        checked, worst = 0, 0.0
        for seed in range(60):
            prompt = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(seed))
            tokens, values, sure = _greedy(model, prompt.tolist(), 8)
            if not sure:
                continue
            found, told = server.generate(prompt.tolist(), version.name, 8)
            assert found == tokens
            worst = max(worst, distance(told, values))
            checked += 1
            if checked == 5:
                break
        print(self.kind, f"{checked} prompts of 8 greedy tokens, off at most {worst:.4f} nats")
        assert checked == 5
        assert worst < version.probe.tolerance

    def test_a_restart_is_noticed_and_made_good(
        self, engine: Engine, server: Server, trainer: Trainer, run_name: str, tmp_path: Path
    ):
        if server._command is None:
            pytest.skip(f"set CKPT_TEST_{self.kind.upper()}_START: a given server is not restarted")
        root = str(tmp_path / "root")
        registry = Registry(root)
        handover = Handover([engine], holder=HOLDER, slots=SLOTS, registry=registry, retries=0)
        trainer.draw(7)
        old = trainer.publish(root, run_name)
        handover.make_live(old, registry.fetch(old, tmp_path / "cache")).raise_if_failed()
        assert handover.restore_missing() is None
        server.kill()
        trainer.draw(8)
        new = trainer.publish(root, run_name)
        report = handover.make_live(new, registry.fetch(new, tmp_path / "cache"))
        assert not report.live
        assert handover.current == old
        server.start()
        server.ready()
        assert engine.adapters() == {}
        handover.restore_missing().raise_if_failed()
        assert list(engine.adapters()) == [old.name]
        handover.make_live(new, tmp_path / "cache" / new.name).raise_if_failed()


def _greedy(model: Any, ids: list[int], count: int) -> tuple[list[int], list[float], bool]:
    """Greedy tokens, their log-probabilities, and whether bfloat16 cannot turn any of them."""
    new: list[int] = []
    values: list[float] = []
    sure = True
    for _ in range(count):
        with torch.no_grad():
            row = torch.log_softmax(model(torch.tensor([[*ids, *new]])).logits[0, -1].float(), -1)
        top = row.topk(2)
        sure = sure and float(top.values[0] - top.values[1]) > 0.1
        new.append(int(top.indices[0]))
        values.append(float(top.values[0]))
    return new, values, sure
