"""The plug-in inside a real vLLM server; skipped where the environment names none.

``CKPT_TEST_VLLM_PYTHON`` is the interpreter of an environment that vLLM is installed in,
``CKPT_TEST_ENGINE_MODEL`` a tiny Qwen2; ``docs/sync.md`` has the command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from archon_lora.models import base_fingerprint
from ckpt.handoff.probe import distance
from ckpt.handoff.vllm import VllmEngine
from ckpt.types import BaseIdentity

pytestmark = [pytest.mark.compat, pytest.mark.slow, pytest.mark.timeout(900)]

PYTHON, MODEL = "CKPT_TEST_VLLM_PYTHON", "CKPT_TEST_ENGINE_MODEL"
START_SECONDS = 300
ROOT = Path(__file__).parents[2]


@dataclass
class Served:
    url: str
    log: Path
    root: Path
    cache: Path

    def ask(self, model: str) -> int:
        body = {"model": model, "prompt": [3, 1, 4], "max_tokens": 1}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120).status_code


def installed(directory: Path) -> str:
    """A path on which this checkout counts as an installed distribution, entry points included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = directory / "archon_lora-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: archon-lora\nVersion: 0\n")
    points = project["entry-points"]["vllm.general_plugins"]
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{lines}")
    return os.pathsep.join([str(directory), str(ROOT)])


@pytest.fixture(scope="module")
def trainer():
    if PYTHON not in os.environ or MODEL not in os.environ:
        pytest.skip(f"set {PYTHON} and {MODEL} for a real vLLM (docs/sync.md)")
    from support.real_engines import Trainer

    return Trainer(os.environ[MODEL])


@pytest.fixture(scope="module")
def served(trainer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from support.sidecar import free_port

    home = tmp_path_factory.mktemp("vllm")
    port = free_port()
    served = Served(f"http://127.0.0.1:{port}", home / "log", home / "root", home / "cache")
    environment = {
        **os.environ,
        "PYTHONPATH": installed(home / "site"),
        "CKPT_VLLM_ROOTS": f"run7={served.root}",
        "CKPT_VLLM_CACHE": str(served.cache),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "PATH": f"{Path(os.environ[PYTHON]).parent}:{os.environ['PATH']}",
    }
    command = [os.environ[PYTHON], "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", os.environ[MODEL], "--served-model-name", "base", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--max-model-len", "256"]
    command += ["--max-num-seqs", "4", "--enforce-eager", "--enable-lora", "--max-loras", "2"]
    command += ["--max-cpu-loras", "2", "--max-lora-rank", "16"]
    with served.log.open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, served.log.read_text()[-4000:]
            assert time.monotonic() < deadline, served.log.read_text()[-4000:]
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{served.url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        yield served
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=60)


def test_versions_are_resolved_and_served_as_they_were_trained(served: Served, trainer) -> None:
    # More versions than the server keeps in memory: it reads their files again.
    versions = []
    for seed in range(4):
        trainer.draw(seed)
        versions.append(trainer.publish(str(served.root), "run7"))
    with contextlib.closing(VllmEngine(served.url)) as engine:
        for version in [*versions, *versions]:
            answer = engine.logprobs(version.probe.token_ids, version.name)
            off = distance(answer, version.probe.logprobs)
            # bfloat16 is off by a little; every other adapter, and the base, by far more.
            others = [item.probe.logprobs for item in versions if item is not version]
            assert 3 * off < min(
                distance(answer, other) for other in [*others, version.probe.base_logprobs]
            )
        paths = engine.adapters()
    assert paths == {version.name: str(served.cache / version.name) for version in versions}
    for version in versions:
        assert json.loads((served.cache / version.name / "adapter_config.json").read_bytes())


def test_other_names_are_refused_and_the_log_says_why(served: Served, trainer) -> None:
    names = {
        "latest": "go on serving",
        "run7": "go on serving",
        "run7-v1": "write run7-v00000001",
        "../root/adapters/run7-v00000001": "not a version's name",
        str(served.root / "adapters" / "run7-v00000001"): "not a version's name",
        "other-v00000001": "no root is configured",
        "run7-v00099999": "no such version",
        "x" * 3000: "3000 characters long",
    }
    for name, reason in names.items():
        assert served.ask(name) == 404, name
        assert reason in served.log.read_text(errors="replace"), name


def test_an_adapter_of_another_base_is_refused(
    served: Served, trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support import real_engines

    publish = real_engines.publish_version
    found = []
    for hashed in ("0" * 64, base_fingerprint(trainer.directory)["config_hash"]):
        base = BaseIdentity("some base", hashed)
        monkeypatch.setattr(
            real_engines,
            "publish_version",
            lambda *a, _b=base, **k: publish(*a, **{**k, "base": _b}),
        )
        found.append(served.ask(trainer.publish(str(served.root), "run7").name))
    assert found == [404, 200]
    assert "was trained over 'some base'" in served.log.read_text(errors="replace")


def test_the_sidecar_keeps_the_same_server_at_the_newest_version(
    served: Served, trainer, tmp_path: Path
) -> None:
    from support.sidecar import SidecarProcess

    root = tmp_path / "root"
    address = f"vllm+{served.url}"
    with contextlib.closing(VllmEngine(served.url)) as engine:
        for name in engine.adapters():
            engine.unload(name)
        with SidecarProcess(root, [address], tmp_path, "--linger", "0") as sidecar:
            for seed in range(3):
                trainer.draw(10 + seed)
                version = trainer.publish(str(root), "run7")
                if seed == 0:
                    sidecar.start()
                sidecar.until_serves(version.name)
                answer = engine.logprobs(version.probe.token_ids, version.name)
                assert distance(answer, version.probe.logprobs) <= version.probe.tolerance
            sidecar.kill()
            before = engine.adapters()
            sidecar.start()
            sidecar.until_serves(version.name)
            assert engine.adapters()[version.name] == before[version.name]
            assert sidecar.metric("load_seconds_count") == 0
            assert sidecar.stop() == 0
