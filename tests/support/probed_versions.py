"""Published versions with probes that a stand-in engine will answer, ready to be handed over."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from ckpt.consolidate import plan_adapter, stream_adapter
from ckpt.handoff.probe import Probe
from ckpt.handoff.registry import Registry, Version
from ckpt.layout import new_attempt
from ckpt.peft import WeightsFile, write_adapter_dir
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import Storage, open_storage
from support.fake_engine import FakeEngine
from support.steps import tiny_adapter

PROMPT = (3, 1, 4, 1, 5, 9, 2, 6)


def publish_for(
    root: str | Path | Storage,
    run: str,
    seed: int,
    engine: FakeEngine | None,
    *,
    prompt: Sequence[int] = PROMPT,
    zero: bool = False,
) -> Version:
    """Publish a small adapter.

    Args:
        root: where.
        run: its run.
        seed: of its weights.
        engine: whose answers the probe holds (both kinds answer alike); None for no probe.
        prompt: the probe's.
        zero: make B zero, so that the adapter changes nothing.
    """
    tensors, export = tiny_adapter(seed=seed, optimizer=False)
    if zero:
        for name in tensors:
            if "lora_b" in name:
                tensors[name].zero_()
    source = MemorySource({name.removeprefix("model."): item for name, item in tensors.items()})
    probe: Probe | None = None
    if engine is not None:
        with tempfile.TemporaryDirectory() as scratch:
            plan = plan_adapter(export, source.records, "bfloat16")
            weights = WeightsFile(plan.size, stream_adapter(plan, source))
            write_adapter_dir(f"{scratch}/a", weights, export.peft_config)
            probe = Probe(
                tuple(prompt),
                tuple(engine.expected(list(prompt), f"{scratch}/a")),
                tuple(engine.expected(list(prompt), None)),
            )
    storage = root if isinstance(root, Storage) else open_storage(root)
    manifest = publish_version(
        storage,
        run=run,
        export=export,
        source=source,
        step=seed,
        policy_version=seed,
        epoch=1,
        attempt=new_attempt(),
        base=None,
        probe=None if probe is None else probe.to_dict(),
    )
    return Registry(storage).get(manifest.name)
