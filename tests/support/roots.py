"""Small roots, engines and places for the blocks of documents."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from ckpt.consolidate import plan_adapter, stream_adapter
from ckpt.handoff.probe import Probe
from ckpt.layout import new_attempt
from ckpt.peft import WeightsFile, write_adapter_dir
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.types import AdapterExport
from support import shown_root
from support.fake_engine import FakeEngine
from support.pages import Stage
from support.steps import write_step, write_writer

LAYERS = 2
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def export_of(modules: list[str]) -> AdapterExport:
    """How PEFT names them, over a base model."""
    export = shown_root.export_of(modules)
    return dataclasses.replace(
        export, peft_config={**export.peft_config, "base_model_name_or_path": "Qwen2.5-0.5B"}
    )


def publish(
    root: str | Path, run: str = "run7", seed: int = 0, *, step: int | None = None, epoch: int = 1
) -> str:
    """Publish an adapter with names that engines know, and what a stand-in will answer."""
    tensors, modules = shown_root.adapter(LAYERS, 0.1, seed)
    export, source = export_of(modules), MemorySource(tensors)
    with contextlib.closing(open_storage(str(root))) as storage:
        plan = plan_adapter(export, source.records, "bfloat16")
        folder = Path(str(root)).parent / f".probe-{run}-{seed}"
        if not folder.exists():
            weights = WeightsFile(plan.size, stream_adapter(plan, source))
            write_adapter_dir(str(folder / "a"), weights, export.peft_config)
        engine = FakeEngine("vllm")  # never started: only asked what it would answer
        probe = Probe(
            tuple(PROMPT),
            tuple(engine.expected(PROMPT, folder / "a")),
            tuple(engine.expected(PROMPT, None)),
        )
        return publish_version(
            storage,
            run=run,
            export=export,
            source=source,
            step=step,
            policy_version=seed,
            epoch=epoch,
            attempt=new_attempt(),
            base=None,
            probe=probe.to_dict(),
        ).name


def root_at(
    path: Path, *, run: str = "run7", versions: int = 2, above: int = 0, steps: tuple[int, ...] = ()
) -> Path:
    """A root with versions, numbered from ``above`` + 1 on, and steps."""
    path.mkdir(parents=True, exist_ok=True)
    if above:
        (path / "adapters" / f"{run}-v{above:08d}").mkdir(parents=True)  # taken, and unfinished
    with contextlib.closing(open_storage(path)) as storage:
        write_writer(storage, 1)
        tensors = shown_root.step_tensors(LAYERS)
        modules = shown_root.adapter(LAYERS, 0.1)[1]
        for step in steps:
            write_step(storage, step, tensors, export=shown_root.export_of(modules))
    for seed in range(versions):
        publish(path, run, seed)
    return path


def bucket(stage: Stage) -> Path:
    """Directories in the place of a bucket, a disk and a cache of the reader's."""
    for place in ("s3://bucket", "/var/cache", "/data", "/dev/shm", "/run/secrets"):
        folder = stage.folder / "places" / place.strip("/:s3").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        stage.places[place] = str(folder)
    return Path(stage.places["s3://bucket"])


def engine(stage: Stage, address: str, kind: str = "vllm", model: Path | None = None) -> None:
    """A stand-in for the engine at an address."""
    started = stage.running.enter_context(FakeEngine(kind, model=model))
    stage.places[address] = started.url.removeprefix("http://")


def on_s3(stage: Stage) -> None:
    server = stage.fixture("s3")
    stage.places |= {
        "s3://bucket": f"s3://{server.bucket}",
        "https://s3.example": server.endpoint_url,
    }
