"""Without LoRA, none of its code is imported; the public names are there all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import archon_lora.engine
import archon_lora.engine.lora_checkpoint

LORA = [
    "archon_lora.adapter",
    "archon_lora.apply",
    "archon_lora.config",
    "archon_lora.expert_targets",
    "archon_lora.experts",
    "archon_lora.init",
    "archon_lora.linear",
    "archon_lora.merge",
    "archon_lora.parallel",
    "archon_lora.peft",
    "archon_lora.sites",
    "archon_lora.stacked",
    "archon_lora.targets",
    "archon_lora.engine.adapter_stream",
    "archon_lora.engine.lora_checkpoint",
]


SCRIPT = """
import sys, torch
from archon_lora.engine import ArchonEngine, EngineConfig, OptimizerConfig, SaveLoadMeta

model, out, rank = sys.argv[1:]
lora = None
if int(rank):
    from archon_lora import LoRAConfig
    lora = LoRAConfig(rank=int(rank))
engine = ArchonEngine(EngineConfig(path=model, lora=lora, device="cpu"))
engine.initialize()
batch = {"input_ids": torch.arange(12).view(2, 6)}
engine.train_batch(batch, lambda logits, _: logits.float().square().mean())
engine.logprobs(batch)
engine.update_weights(1)
for format in ("hf", "dcp"):
    meta = SaveLoadMeta(path=f"{out}/{format}", weight_format=format, with_optim=True)
    engine.save(meta)
    engine.load(meta)
engine.save(SaveLoadMeta(path=f"{out}/weights"))
engine.load(SaveLoadMeta(path=f"{out}/weights"))
engine.close()
print("\\n".join(name for name in sys.modules if name.startswith("archon_lora")))
"""


def modules_after_a_run(model: str, out: Path, rank: int) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, model, str(out), str(rank)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_whole_run_without_lora_imports_none_of_it(model_dir: str, tmp_path: Path) -> None:
    assert not modules_after_a_run(model_dir, tmp_path / "full", 0) & set(LORA)


def test_the_same_run_with_lora_imports_it(model_dir: str, tmp_path: Path) -> None:
    assert modules_after_a_run(model_dir, tmp_path / "lora", 2) >= set(LORA) - {"archon_lora.merge"}


def test_every_public_name_is_there() -> None:
    for name in archon_lora.engine.__all__:
        assert getattr(archon_lora.engine, name).__name__ == name
    assert archon_lora.engine.__all__ == sorted(archon_lora.engine._HOMES)
