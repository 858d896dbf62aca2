"""A root with some of everything that the pages show."""

from __future__ import annotations

import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch

from ckpt.envelope import utc_now
from ckpt.handoff.replica_record import EngineRecord, ReplicaRecord
from ckpt.holds import pin, take_lease
from ckpt.layout import new_attempt, replica_path, segment_path, step_name
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import Storage, open_storage
from ckpt.timeline import OpenSave, SaveRecord, Segment
from ckpt.types import AdapterExport, BaseIdentity, TensorRule
from support.steps import write_step, write_writer

MODULES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
RANK = 4
BASE = BaseIdentity("Qwen/Qwen2-7B-Instruct", "a" * 64)
RUN = "grpo"
HOSTILE = '<img src=x onerror="document.title=1">\'"&'


def adapter(layers: int, grown: float, seed: int = 0) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors of an adapter whose updates grow with the layer; and its modules."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    names = []
    for layer in range(layers):
        for place, (label, (out, width)) in enumerate(MODULES.items()):
            module = f"model.layers.{layer}.{label}"
            hill = math.exp(-(((layer / layers) - 0.25 - 0.09 * place) ** 2) / 0.08)
            a = torch.randn(RANK, width, generator=generator) / math.sqrt(width)
            b = torch.randn(out, RANK, generator=generator) * grown * (0.15 + hill)
            tensors[f"{module}.lora_a.weight"] = a
            tensors[f"{module}.lora_b.weight"] = b
            names.append(module)
    return tensors, names


def export_of(modules: list[str]) -> AdapterExport:
    """How PEFT names them."""
    return AdapterExport(
        peft_config={
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
            "bias": "none",
        },
        rules=tuple(
            TensorRule(f"{m}.lora_{s.lower()}.weight", f"base_model.model.{m}.lora_{s}.weight")
            for m in modules
            for s in "AB"
        ),
    )


def publish(storage: Storage, number: int, layers: int = 4, seed: int = 0) -> str:
    """One more version; ``seed`` and ``number`` make its values."""
    tensors, modules = adapter(layers, 0.02 * (1 + number), seed)
    source = MemorySource(tensors)
    return publish_version(
        storage,
        run=RUN,
        export=export_of(modules),
        source=source,
        step=10 * number,
        policy_version=number,
        epoch=1,
        attempt=new_attempt(),
        base=BASE,
        probe=None,
    ).name


def step_tensors(layers: int) -> dict[str, torch.Tensor]:
    """An adapter with the state of Adam."""
    tensors, _modules = adapter(layers, 0.1)
    found = {f"model.{name}": tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"optim.{name}.{key}"] = torch.zeros_like(tensor)
        found[f"optim.{name}.step"] = torch.tensor(1.0)
    return found


def fill(path: Path, *, saves: int = 60, layers: int = 4, versions: int = 3) -> Storage:
    """Make the root: steps that lie there, were pruned, failed and are in flight; versions, some
    served; a damaged step, a pinned one, and a text that would be a script elsewhere."""
    storage = open_storage(path)
    write_writer(storage, 1)
    names = [publish(storage, number, layers) for number in range(1, versions + 1)]
    tensors = step_tensors(layers)
    export = export_of([f"model.layers.{n}.{m}" for n in range(layers) for m in MODULES])
    kept = [step for step in range(saves) if step % 20 == 0 or step >= saves - 4]
    for step in kept:
        write_step(
            storage,
            step,
            tensors if step == kept[-1] else {"model.a": torch.ones(8, 4)},
            world=4 if step == kept[-1] else 1,
            dim={name: 1 for name in tensors if ".lora_b." in name},
            export=export if step == kept[-1] else None,
            base=BASE if step == kept[-1] else None,
            policy_version=step,
            metrics={"reward": round(0.2 + 0.6 * step / saves, 3)},
            created=moment(saves, step),
        )
    pin(storage, step_name(kept[0], 1), "the beginning")
    shard = next(Path(path, "steps", step_name(kept[1], 1)).glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    _tell(storage, saves, kept, names)
    _replicas(storage, names)
    take_lease(storage, names[-1], "eval-box", 600)
    return storage


def moment(saves: int, step: int) -> str:
    """When a step was saved: every 21 seconds."""
    return (datetime.now(UTC) - timedelta(seconds=21 * (saves - step))).isoformat()


def _tell(storage: Storage, saves: int, kept: list[int], names: list[str]) -> None:
    rng = random.Random(3)
    now = datetime.now(UTC)
    records = []
    for step in range(saves):
        at = moment(saves, step)
        first = step == 0
        wait = rng.uniform(30, 90) if step % 17 == 9 else 0.0
        copy, plan = rng.uniform(38, 46), 310.0 if first else rng.uniform(0.2, 0.6)
        write, commit = rng.uniform(640, 900), rng.uniform(25, 60)
        publishes = step % 2 == 1
        publish_ms = rng.uniform(120, 170) if publishes else None
        stall = wait + copy + plan + rng.uniform(2, 5)
        numbers = {
            "stall_ms": stall,
            "wait_ms": wait,
            "plan_ms": plan,
            "copy_ms": copy,
            "write_ms": write,
            "commit_ms": commit,
            "total_ms": stall + write + commit + (publish_ms or 0) + rng.uniform(1, 30),
            "stage_bytes": 484e6,
            "queue_depth": 0.0,
        }
        if publish_ms is not None:
            numbers |= {"publish_ms": publish_ms, "publish_lag_ms": stall + write + publish_ms}
        failed, skipped = step == saves - 9, step == saves - 15
        gone = step - 4 if 0 <= step - 4 not in {*kept, saves - 9, saves - 15} else None
        if skipped:
            numbers = {"queue_depth": 2.0}
        version = names[-1] if step == saves - 1 else None
        records.append(
            SaveRecord(
                at=at,
                step=step,
                kind="save",
                attempt=f"{step:08d}",
                outcome="failed" if failed else "skipped" if skipped else "done",
                version=version if not (failed or skipped) else None,
                problem=f"SaveAborted: rank 3: the disk is full {HOSTILE}" if failed else None,
                world=4,
                numbers=numbers,
                slowest={} if skipped else {"stall_ms": rng.randrange(4), "write_ms": 3},
                removed=() if gone is None else (step_name(gone, 1),),
            )
        )
    segment = Segment(
        source="trainer",
        epoch=1,
        host="node-1",
        began=records[0].at,
        written=utc_now(),
        open=(OpenSave(saves, "save", "flying00", utc_now()),),
        saves=tuple(records),
    )
    storage.put(segment_path(int(now.timestamp() * 1000), "trainer1"), segment.to_bytes())


def _replicas(storage: Storage, names: list[str]) -> None:
    def engine(number: int, live: str | None, *, up: bool = True, problem: str | None = None):
        proved = None if live is None else utc_now()
        url = f"http://10.0.0.{number}:8000"
        return EngineRecord(url, up, live, "expected" if live else None, proved, problem)

    values = {"run": RUN, "every_s": 60.0, "stopped": False, "newest": len(names)}
    fresh = ReplicaRecord(
        holder="sync-gpu-1",
        host="gpu-1",
        at=utc_now(),
        current=names[-1],
        engines=(
            engine(1, names[-1]),
            engine(2, names[max(0, len(names) - 2)]),
            engine(3, None, up=False, problem=f"http://10.0.0.3:8000: no answer {HOSTILE}"),
        ),
        passed_over=((names[0], "damaged: block 0 has another CRC32"),),
        **values,
    )
    old = (datetime.now(UTC) - timedelta(hours=3)).isoformat()
    silent = ReplicaRecord(
        holder="sync-gpu-2",
        host="gpu-2",
        at=old,
        current=names[0],
        engines=(engine(4, names[0]),),
        **values,
    )
    for record in (fresh, silent):
        storage.put(replica_path(record.holder), record.to_bytes())
