"""What the ranks of the tests of HuggingFace models and of other trainers' checkpoints do.

Starting ranks that import transformers costs seconds, so one world does everything; each part
returns what its test looks at.
"""

from __future__ import annotations

import os
import random
import socket
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard

from archon_lora import LoRAConfig, adapter_shard_placement, apply_lora
from ckpt import CheckpointManager, TrainState
from ckpt.fqn import canonical_fqn
from ckpt.migrate.prime_rl import find_prime_rl, import_prime_rl
from ckpt.migrate.verl import find_verl, import_verl

RANK = 3
"""Odd, so that two ranks hold shards of different sizes."""


def quiet() -> None:
    """Warnings of transformers, PEFT and accelerate about themselves."""
    for text in (".*is_gradient_checkpointing", "Could not find a config file", ".*process group"):
        warnings.filterwarnings("ignore", message=text)


def llama() -> Any:
    """A random model of two small layers, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
        )
    )
    torch.set_rng_state(state)
    return model


def peft_llama(*, dropout: float = 0.25) -> Any:
    """The same, wrapped by PEFT; the adapter's first values are the same, too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    settings = LoraConfig(
        r=RANK,
        lora_alpha=8,
        lora_dropout=dropout,
        target_modules=["q_proj", "v_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(llama(), settings)


def shard(model: Any) -> Any:
    """FSDP2 on every layer and on the root, as trainers do it."""
    place = adapter_shard_placement(model)
    for module in list(model.modules()):
        if type(module).__name__ == "LlamaDecoderLayer":
            fully_shard(module, shard_placement_fn=place)
    return fully_shard(model, shard_placement_fn=place)


@dataclass
class Position:
    """A data loader as far as a checkpoint is concerned."""

    batch: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]


@dataclass
class Run:
    """One rank's side of a training run."""

    model: Any
    optimizer: Any
    scheduler: Any
    data: Position
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward

    @classmethod
    def of(cls, model: Any, *, everything: bool = False) -> Run:
        params = [p for p in model.parameters() if everything or p.requires_grad]
        optimizer = torch.optim.AdamW(params, lr=1e-2)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        return cls(model.train(), optimizer, scheduler, Position())

    def steps(self, count: int) -> list[float]:
        """Train; the losses of this rank."""
        losses = []
        for _ in range(count):
            seed = 100 * self.data.batch + dist.get_rank()
            ids = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(seed))
            loss = self.model(input_ids=ids, labels=ids).loss
            self.backward(loss)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.data.batch += 1
            losses.append(loss.item())
        return losses

    def state(self, **parts: Any) -> TrainState:
        values: dict[str, Any] = {"dataloader": self.data, "extra": {"policy_version": 0}} | parts
        return TrainState(self.model, self.optimizer, self.scheduler, **values)

    def whole(self) -> dict[str, torch.Tensor]:
        """The adapter, gathered, by canonical name."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                value = parameter.detach()
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                found[canonical_fqn(name, ddp=self._ddp())] = value.clone()
        return found

    def _ddp(self) -> set[str]:
        return {""} if isinstance(self.model, nn.parallel.DistributedDataParallel) else set()


def resumes(make: Callable[[], Run], root: Path) -> dict[str, Any]:
    """Save in the middle of a run, go on; and go on again from what was saved."""
    torch.manual_seed(50 + dist.get_rank())
    run = make()
    run.steps(2)
    with CheckpointManager(root, publish_dtype="float32") as manager:
        manager.save(1, run.state(), publish=True).wait()
    at_save = run.whole()
    went_on = run.steps(2)
    end = run.whole()
    torch.manual_seed(9)
    again = make()
    with CheckpointManager(root) as manager:
        state = again.state()
        restored = manager.restore(state)
    resumed = again.steps(2)
    final = again.whole()
    dist.barrier()
    return {
        "restored": restored,
        "went_on": went_on,
        "resumed": resumed,
        "same_weights": all(torch.equal(final[name], end[name]) for name in end),
        "names": sorted(state.live().tensors),
        "adapter": at_save if dist.get_rank() == 0 else None,
        "position": again.data.batch,
    }


def accelerated() -> Run:
    """PEFT's model as accelerate prepares it: DDP, and wrappers around optimizer and schedule."""
    from accelerate import Accelerator

    run = Run.of(peft_llama())
    accelerator = Accelerator(cpu=True)
    run.model, run.optimizer, run.scheduler = accelerator.prepare(
        run.model, run.optimizer, run.scheduler
    )
    run.backward = accelerator.backward
    return run


def applied() -> Run:
    """A plain transformers model with this project's own adapters."""
    model = llama()
    apply_lora(model, LoRAConfig(rank=RANK, alpha=8, target_modules=["q_proj", "v_proj"]))
    return Run.of(shard(model))


def rng_of_verl() -> dict[str, Any]:
    """As verl captures it."""
    return {
        "cpu": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "random": random.getstate(),
    }


def save_as_verl(run: Run, folder: Path, *, lora_only: bool) -> None:
    """The files that verl's FSDP checkpoint manager writes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    folder.mkdir(parents=True, exist_ok=True)
    state = run.model.state_dict()
    if lora_only:
        state = {name: value for name, value in state.items() if "lora_" in name}
    extra = {"lr_scheduler": run.scheduler.state_dict(), "rng": rng_of_verl()}
    files = {"model": state, "optim": run.optimizer.state_dict(), "extra_state": extra}
    for kind, value in files.items():
        torch.save(value, folder / f"{kind}_world_size_{world}_rank_{rank}.pt")
    if rank == 0:
        (folder / "lora_train_meta.json").write_text(
            f'{{"r": {RANK}, "lora_alpha": 8, "task_type": "CAUSAL_LM"}}'
        )
    dist.barrier()


def from_verl(root: Path, *, lora_only: bool) -> dict[str, Any]:
    """Train, save as verl does, import, and go on from the imported step."""
    torch.manual_seed(70 + dist.get_rank())
    run = Run.of(shard(peft_llama()), everything=True)
    run.steps(2)
    folder = root / "run/global_step_12/actor"
    save_as_verl(run, folder, lora_only=lora_only)
    went_on = run.steps(2)
    skipped: tuple[str, ...] = ()
    if dist.get_rank() == 0:
        found = find_verl(folder.parent)
        assert found is not None
        skipped = import_verl(found, str(root / "ours")).skipped
    dist.barrier()
    again = Run.of(shard(peft_llama()), everything=True)
    with CheckpointManager(root / "ours") as manager:
        state = again.state(dataloader=None, extra=(extra := {}))
        restored = manager.restore(state)
        again.data.batch = 2
        resumed = again.steps(2)
    return {
        "restored": restored,
        "went_on": went_on,
        "resumed": resumed,
        "extra": extra,
        "skipped": skipped,
    }


class AppState(dcp.stateful.Stateful):
    """As prime-rl hands its trainer to DCP."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        model, optimizers = get_state_dict(self.run.model, [self.run.optimizer])
        return {
            "model": model,
            "optimizers": optimizers,
            "scheduler": self.run.scheduler.state_dict(),
            "progress": {"step": self.run.data.batch, "total_tokens": 24, "total_samples": 4},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def from_prime_rl(root: Path) -> dict[str, Any]:
    """Train, save as prime-rl does, import, and go on from the imported step."""
    run = Run.of(shard(llama()))
    run.steps(2)
    trainer = root / "checkpoints/step_7/trainer"
    if dist.get_rank() == 0:
        (trainer / "dataloader").mkdir(parents=True)
    dist.barrier()
    torch.save(run.data.state_dict(), trainer / f"dataloader/rank_{dist.get_rank()}.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of DCP about its own use of torch
        dcp.save({"app": AppState(run)}, checkpoint_id=str(trainer))
    went_on = run.steps(1)
    if dist.get_rank() == 0:
        found = find_prime_rl(trainer.parent)
        assert found is not None
        import_prime_rl(found, str(root / "ours"))
    dist.barrier()
    again = Run.of(shard(llama()))
    with CheckpointManager(root / "ours") as manager:
        restored = manager.restore(again.state(extra=(extra := {})))
        resumed = again.steps(1)
    return {
        "restored": restored,
        "went_on": went_on,
        "resumed": resumed,
        "extra": extra,
        "position": again.data.batch,
    }


def everything(rank: int, world: int, root: Path) -> dict[str, Any]:
    """All of the above, one after the other."""
    quiet()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What a launcher sets, and accelerate reads even where a group exists already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {
        "peft_fsdp2": resumes(lambda: Run.of(shard(peft_llama())), root / "fsdp2"),
        "peft_accelerate": resumes(accelerated, root / "accelerate"),
        "applied_fsdp2": resumes(applied, root / "applied"),
        "verl": from_verl(root / "verl", lora_only=False),
        "verl_lora_only": from_verl(root / "verl-lora", lora_only=True),
        "prime_rl": from_prime_rl(root / "prime"),
    }
