"""A model cut into stages: ranks with different parameters, several or none, save one state."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt import AdapterExport, CheckpointManager, CkptError, Retention, TensorRule, TrainState
from support.tiny_run import whole

LAYERS = 4
STEPS = 3
KEEP = Retention(latest=50)
EXPORT = AdapterExport(
    peft_config={
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["lin"],
        "bias": "none",
    },
    rules=tuple(
        TensorRule(f"layers.{layer}.{ours}", f"base_model.model.l.{layer}.lin.lora_{hf}.weight")
        for layer in range(1, LAYERS)
        for ours, hf in (("a", "A"), ("b", "B"))
    ),
)


class Layer(nn.Module):
    """A frozen map with a rank-2 adapter; layer 0 has none."""

    def __init__(self, number: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        self.base = nn.Parameter(torch.randn(6, 6, generator=generator), requires_grad=False)
        if number:
            self.a = nn.Parameter(torch.randn(2, 6, generator=generator))
            self.b = nn.Parameter(torch.randn(6, 2, generator=generator))


class Stage(nn.Module):
    """Some of the layers, under the names that they have in the whole model."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(number): Layer(number) for number in numbers})


Division = tuple[tuple[tuple[int, ...], ...], ...]
"""For each rank, the stages that it holds: the layers of each."""

WHOLE: Division = (((0, 1, 2, 3),),)
PARTS: Division = (((0,),), ((1,),), ((2,), (3,)))
"""No adapter on the first rank, one stage on the second, two on the third."""
OTHER: Division = (((3, 2),), (), ((0,), (1,)))
"""The second rank has no stage at all."""


class Trainer:
    """One rank's stages, with an optimizer and a schedule for each.

    Args:
        mine: the layers of each stage.
        parted: give a list of stages; otherwise there is one, which is the whole model.
        disturbed: begin with other values than the others' layers have.
    """

    def __init__(
        self, mine: tuple[tuple[int, ...], ...], *, parted: bool, disturbed: bool = False
    ) -> None:
        self.models = [Stage(numbers) for numbers in mine]
        if disturbed:
            with torch.no_grad():
                for model in self.models:
                    for parameter in model.parameters():
                        parameter += 1
        trained = [[p for p in m.parameters() if p.requires_grad] for m in self.models]
        self.optimizers = [torch.optim.AdamW(p, lr=0.1) for p in trained if p]
        self.schedules = [
            torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
            for optimizer in self.optimizers
        ]
        self.state = TrainState(
            self.models if parted else self.models[0],
            self.optimizers,
            self.schedules,
            extra={"policy_version": 0},
            export=EXPORT,
        )

    def step(self, number: int) -> None:
        """An update that depends on the step and the layer alone."""
        for model in self.models:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = (parameter.detach() * (number + 1)).sin()
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            optimizer.step()
            schedule.step()
        self.state.extra["policy_version"] += 1

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor of the state, and the learning rates."""
        with torch.no_grad():
            found = {
                name: hashlib.sha256(whole(tensor).numpy().tobytes()).hexdigest()
                for name, tensor in self.state.live().tensors.items()
            }
        rates = {group["lr"] for o in self.optimizers for group in o.param_groups}
        return found | {"lr": str(sorted(rates))} if rates else found


def on_three_ranks(rank: int, world: int, folder: str) -> dict[str, object]:
    """All that needs stages on ranks; a run of the whole model is there already."""
    parts, whole = f"{folder}/parts", f"{folder}/whole"
    found: dict[str, object] = {"parts": train_and_save(rank, world, parts, PARTS)}
    dist.barrier()
    found["other"] = resume(rank, world, parts, OTHER, STEPS)
    found["from whole"] = resume(rank, world, whole, PARTS, STEPS)
    found["warm"] = warm(rank, world, f"{folder}/new", OTHER, version_of(whole))
    found["refused"] = refusals(rank, world, parts)
    found["tiers"] = tiers(rank, world, folder)
    return found


def version_of(root: str) -> str:
    """Where the first version of a run lies."""
    return f"{root}/adapters/run-v{1:08}"


def train_and_save(rank: int, world: int, root: str, division: Division) -> dict:
    """Save before any update, then after each; publish at the end."""
    trainer = Trainer(division[rank], parted=world > 1)
    asked: list[str] = []
    with CheckpointManager(root, vote_timeout=20, retention=KEEP) as manager:
        _count_plans(manager, asked)
        manager.save(0, trainer.state).wait(20)
        for number in range(1, STEPS + 1):
            trainer.step(number)
            manager.save(number, trainer.state, publish=number == STEPS).wait(20)
        version = manager.publish(trainer.state).published.result(20)
    return {
        "digests": trainer.digests(),
        "names": list(trainer.state.live().tensors),
        "plans": len(asked),
        "version": None if version is None else version.adapter_sha256,
    }


def _count_plans(manager: CheckpointManager, into: list[str]) -> None:
    planner = manager._planner
    plan = planner._plan

    def counted(*args: object, **kwargs: object) -> object:
        into.append("plan")
        return plan(*args, **kwargs)

    planner._plan = counted


def resume(rank: int, world: int, root: str, division: Division, step: int) -> dict:
    """Restore into other values, under another division; then save it once more."""
    trainer = Trainer(division[rank], parted=world > 1, disturbed=True)
    with CheckpointManager(root, vote_timeout=20, retention=KEEP) as manager:
        start = manager.restore(trainer.state, step=step)
        found = {"start": start, "digests": trainer.digests(), "extra": dict(trainer.state.extra)}
        manager.save(step + 100, trainer.state).wait(20)
    return found


def warm(rank: int, world: int, root: str, division: Division, url: str) -> dict[str, str]:
    """Begin with the values of a published version."""
    trainer = Trainer(division[rank], parted=world > 1, disturbed=True)
    with CheckpointManager(root, vote_timeout=20, retention=KEEP) as manager:
        manager.warm_start(trainer.state, url)
    return trainer.digests()


def refusals(rank: int, world: int, root: str) -> dict[str, str]:
    """What goes wrong when stages do not fit together; on every rank, and nothing changes."""
    said: dict[str, str] = {}

    def refused(name: str, trainer: Trainer, act: Callable[[CheckpointManager], object]) -> None:
        before = trainer.digests()
        try:
            with CheckpointManager(root, vote_timeout=10, retention=KEEP) as manager:
                act(manager)
        except CkptError as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert trainer.digests() == before
        dist.barrier()

    short = (((0,),), ((1,),), ((2,),))
    lacking = Trainer(short[rank], parted=True)
    refused("lacking", lacking, lambda manager: manager.restore(lacking.state, step=STEPS + 100))
    with CheckpointManager(root, vote_timeout=10, retention=KEEP) as manager:
        manager.restore(Trainer(short[rank], parted=True).state, step=STEPS + 100, strict=False)
        assert manager.last_restore is not None
        said["left out"] = " ".join(manager.last_restore.extra)
    part = Trainer((((0,),), ((1,),), ((2, 3),))[rank], parted=rank != 2)
    refused("mixed", part, lambda manager: manager.restore(part.state, step=STEPS + 100))
    idle = Trainer((((0,),), ((0,),), ((0,),))[rank], parted=True)
    refused("idle", idle, lambda manager: _saved(manager, idle))
    differ = Trainer(PARTS[rank], parted=True)
    if rank == 1:
        differ.state._export = AdapterExport(EXPORT.peft_config, EXPORT.rules[:2])
    refused("export", differ, lambda manager: _saved(manager, differ))
    rates = Trainer(PARTS[rank], parted=True)
    for schedule in rates.schedules if rank == 1 else []:
        schedule.step()
    refused("schedule", rates, lambda manager: _saved(manager, rates))
    alone = Trainer(PARTS[1] if rank else ((1, 2),), parted=False)
    refused("not a list", alone, lambda manager: _saved(manager, alone))
    return said


def _saved(manager: CheckpointManager, trainer: Trainer) -> None:
    manager.restore(Trainer(PARTS[manager._board.rank], parted=True).state, step=STEPS + 100)
    manager.save(300, trainer.state).wait(20)


def tiers(rank: int, world: int, folder: str) -> dict:
    """Two ranks on one node, the third on another; each node keeps what its ranks hold."""
    home = f"{folder}/node-{rank // 2}"
    with CheckpointManager(f"{folder}/remote", vote_timeout=20, local_tier=home) as manager:
        trainer = Trainer(PARTS[rank], parted=True)
        trainer.step(1)
        manager.save(0, trainer.state, publish=True).wait(30)
        manager.wait_mirrored(60)
        wanted = trainer.digests()
        fresh = Trainer(PARTS[rank], parted=True, disturbed=True)
        manager.restore(fresh.state)
        assert manager.last_restore is not None
        local = manager.last_restore.local
    (shards,) = ({p.name for p in step.glob("shard-*")} for step in Path(home).glob("steps/*"))
    return {"local": local, "same": fresh.digests() == wanted, "shards": sorted(shards)}


def replicas(rank: int, world: int, root: str) -> dict:
    """HSDP, 2 x 2: who writes what of tensors that two ranks hold each."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(8)))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = TrainState(model, optimizer)
    with CheckpointManager(root, vote_timeout=20, retention=KEEP) as manager:
        manager.save(0, state).wait(20)
    tensors = state.live().tensors.values()
    return {
        "whole": sum(t.numel() * t.element_size() for t in tensors),
        "held": sum(p.to_local().numel() for p in model.parameters()),
    }
