"""Sections about the hand-over: from the trainer's call to a version that an engine has proven.

The manager publishes in this process, ``ckpt sync`` and the engine are processes of their own. The
engine is a stand-in: it reads the adapter as a real one does and answers as one, without a model.
Where the environment names a real one (``CKPT_TEST_VLLM_URL``, ``CKPT_TEST_SGLANG_URL``, and the
model's directory in ``CKPT_TEST_ENGINE_MODEL``), that one is measured as well, with an adapter of
its model's shapes.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import s3fs
import torch
from safetensors.torch import save_file

from ckpt import CheckpointManager, Retention, TrainState
from ckpt.handoff.probe import Probe
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME

from .processes import Settings
from .rounds import Sample, interleave
from .s3_server import S3Server, server_for
from .savers import DEADLINE_S
from .sidecar import RUN, Sidecar
from .workload import Shapes, Workload, build_model, export

PARTS: Final = ("stage", "write", "commit", "notice", "pull", "drive", "load", "proof")
"""One after the other, from the call to live; ``load`` is the engine's own."""
STAND_IN: Final = "publish and ckpt sync, stand-in engine"
PROMPT: Final = tuple(range(1, 17))
TESTS: Final = Path(__file__).parents[1] / "tests"

_MODEL: Final = "CKPT_TEST_ENGINE_MODEL"
_REAL: Final = {kind: f"CKPT_TEST_{kind.upper()}_URL" for kind in ("vllm", "sglang")}


class HandOver:
    """Publishes, and waits until the sidecar says that the version is live.

    Args:
        name: what the tables call it.
        state: what is published.
        probe: what the engine must answer, or None.
        root: URL of the run's root.
        sidecar: works on that root.
        options: for the store.
    """

    def __init__(
        self,
        name: str,
        state: TrainState,
        probe: Probe | None,
        root: str,
        sidecar: Sidecar,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self._state, self._sidecar = state, sidecar
        self._probe = None if probe is None else probe.to_dict()
        self._manager = CheckpointManager(
            root,
            storage_options=None if options is None else dict(options),
            retention=Retention(versions=1),
            run_name=RUN,
        )
        self.newest: str | None = None

    def measure(self, number: int) -> Sample:
        """Every part in milliseconds, and sums of them.

        ``total`` is all of them, ``ours`` all but the engine's own load, ``after_commit`` what of
        that comes after the version exists; ``cpu`` is processor time of trainer and sidecar.
        """
        del number
        used = time.process_time() + self._sidecar.cpu_s()
        called = time.time()
        handle = self._manager.publish(self._state, probe=self._probe)
        handle.wait_staged(DEADLINE_S)
        staged = time.time()
        manifest = handle.published.result(DEADLINE_S)
        told = time.time()
        used -= time.process_time()
        if manifest is None:
            raise AssertionError(handle)
        switch = self._sidecar.until_live(manifest.name, DEADLINE_S)
        used -= self._sidecar.cpu_s()
        self._manager.wait(DEADLINE_S)  # its retention is not to disturb the next trial
        self.newest = manifest.name
        written = datetime.fromisoformat(manifest.created).timestamp()
        # A version may be seen before its writer has heard that it exists.
        committed = min(told, switch["seen"])
        load, proof = switch["load_s"], switch["proof_s"]
        seconds = {
            "stage": staged - called,
            "write": written - staged,
            "commit": committed - written,
            "notice": switch["seen"] - committed,
            "pull": switch["cached"] - switch["seen"],
            "drive": switch["live"] - switch["cached"] - load - proof,
            "load": load,
            "proof": proof,
            "total": switch["live"] - called,
            "ours": switch["live"] - called - load,
            "after_commit": switch["live"] - committed - load,
            "cpu": -used,
        }
        return {part: 1e3 * value for part, value in seconds.items()}

    def close(self) -> None:
        """Stop the manager's thread."""
        self._manager.close()


class PlainGet:
    """One GET of the newest version's weights with s3fs, into memory: the floor of a pull."""

    name = "s3fs cat_file, one GET"

    def __init__(self, hand_over: HandOver, root: str, server: S3Server) -> None:
        self._hand_over, self._root = hand_over, root
        self._fs = s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True)

    def measure(self, number: int) -> Sample:
        """``total`` in milliseconds."""
        del number
        path = f"{self._root}/adapters/{self._hand_over.newest}/{WEIGHTS_NAME}"
        began = time.perf_counter()
        self._fs.cat_file(path)
        return {"total": 1e3 * (time.perf_counter() - began)}


def handoff(settings: Settings) -> dict[str, Any]:
    """From the call to live, root and cache on the file system of ``settings.folder``."""
    with ExitStack() as stack:
        trials, skipped = _real_engines(stack, settings)
        root = str(settings.folder / "root")
        trials.insert(0, _stand_in(stack, settings, root))
        return _measured(settings, trials, skipped)


def handoff_s3(settings: Settings) -> dict[str, Any]:
    """The same over S3: the server that the environment names, else moto."""
    with ExitStack() as stack:
        server = stack.enter_context(server_for(settings.folder))
        root = f"{server.bucket_url}/handoff-{os.getpid()}"
        ours = _stand_in(stack, settings, root, server.storage_options)
        section = _measured(settings, [ours, PlainGet(ours, root, server)], {})
    return {**section, "server": server.name}


def _measured(settings: Settings, trials: list[Any], skipped: dict[str, str]) -> dict[str, Any]:
    rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds, warm=2)
    size = sum(p.numel() * 2 for p in build_model(settings.workload).parameters())
    return {"bytes": size, "rounds": rounds, "skipped": skipped}


def _stand_in(
    stack: ExitStack, settings: Settings, root: str, options: Mapping[str, Any] | None = None
) -> HandOver:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from support.fake_engine import FakeEngine

    state = _state(settings.workload)
    engine = stack.enter_context(FakeEngine("vllm", max_lora_rank=settings.workload.rank))
    with tempfile.TemporaryDirectory(dir=settings.folder) as scratch:
        _write_adapter(settings.workload, state, Path(scratch))
        answers = [tuple(engine.expected(list(PROMPT), path)) for path in (scratch, None)]
    probe = Probe(PROMPT, *answers)
    home = settings.folder / "stand-in"
    sidecar = stack.enter_context(Sidecar(root, engine.address, home))
    trial = HandOver(STAND_IN, state, probe, root, sidecar, options)
    stack.callback(trial.close)
    return trial


def _real_engines(stack: ExitStack, settings: Settings) -> tuple[list[Any], dict[str, str]]:
    trials: list[Any] = []
    skipped = {}
    for kind, variable in _REAL.items():
        if variable not in os.environ or _MODEL not in os.environ:
            skipped[f"hand-over to a real {kind}"] = f"{variable} and {_MODEL} name none"
            continue
        shapes = _shapes_of(Path(os.environ[_MODEL]))
        root = str(settings.folder / f"root-{kind}")
        address = f"{kind}+{os.environ[variable]}"
        sidecar = stack.enter_context(Sidecar(root, address, settings.folder / kind))
        state = _state(shapes)
        trial = HandOver(
            f"publish and ckpt sync, real {kind}, a model of its own", state, None, root, sidecar
        )
        stack.callback(trial.close)
        trials.append(trial)
    return trials, skipped


def _state(workload: Workload) -> TrainState:
    return TrainState(build_model(workload, torch.bfloat16), export=export(workload))


def _shapes_of(model: Path) -> Shapes:
    """An adapter of rank 8 for the Qwen2 that lies there."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    head = config["hidden_size"] // config["num_attention_heads"]
    return Shapes(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        kv=head * config["num_key_value_heads"],
        intermediate=config["intermediate_size"],
        rank=8,
    )


def _write_adapter(workload: Workload, state: TrainState, folder: Path) -> None:
    """The adapter as it will be published, so that the engine's answers can be foretold."""
    rules = export(workload)
    tensors = state.live().tensors
    named = {rule.key: tensors[f"model.{rule.source}"] for rule in rules.rules}
    save_file(named, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    text = json.dumps(dict(rules.peft_config))
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
