"""What the ranks of the tests of the AReaL plug-in do, on a stand-in for AReaL."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from archon_lora.engine.areal import ArchonLoRA, HandOver
from archon_lora.errors import ArchonLoraError
from ckpt.handoff import Registry
from ckpt.peft import read_adapter

SITE = Path(__file__).parent / "areal_site"
LORA = {"use_lora": True, "lora_rank": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


class Rollout:
    """AReaL's client of the rollout engines, as far as an update of weights is concerned."""

    def __init__(self) -> None:
        self.paused = False
        self.version = 0
        self.loaded: list[tuple[str, str, bool, dict[str, torch.Tensor]]] = []
        self.fails = False
        self.addresses: list[str] = []
        self._threads = ThreadPoolExecutor(1)

    def pause_generation(self) -> None:
        self.paused = True

    def continue_generation(self) -> None:
        self.paused = False

    def update_weights_from_disk(self, meta: Any) -> Future[None]:
        return self._threads.submit(self._load, meta)

    def _load(self, meta: Any) -> None:
        from areal.utils import name_resolve, names

        name_resolve.wait(names.update_weights_from_disk("e", "t", self.version), timeout=20)
        if self.fails:
            raise RuntimeError("a replica is gone")
        config, tensors = read_adapter(meta.path)
        assert config["peft_type"] == "LORA"
        name = f"{meta.lora_name}-v{meta.version}"
        self.loaded.append((name, meta.path, self.paused, tensors))
        self.version = meta.version
        if meta.clear_checkpoint_after_load:
            shutil.rmtree(meta.path)


def engine_of(
    model: Path, root: Path | None, layout: dict[str, int] | None = None, **settings: Any
) -> Any:
    """An initialised engine of AReaL's with LoRA before it."""
    from areal.api import FinetuneSpec, ParallelStrategy
    from areal.api.cli_args import TrainEngineConfig
    from areal.experimental.engine.archon_engine import ArchonPPOActor

    class LoRAActor(ArchonLoRA, ArchonPPOActor):
        hand_over = HandOver(
            root=None if root is None else str(root), run="r", in_flight=2, dtype="float32"
        )

    engine = LoRAActor(TrainEngineConfig(path=str(model), **(LORA | settings)))
    engine.create_process_group(ParallelStrategy(**(layout or {})))
    engine.initialize(None, FinetuneSpec(1, 40, 4))
    return engine


def train(engine: Any, first: int, count: int) -> list[float]:
    """Losses of ``count`` updates; the data depends on the rank and the number."""
    losses: list[float] = []
    for number in range(first, first + count):
        seed = 10 * number + dist.get_rank()
        ids = torch.randint(30, (2, 8), generator=torch.Generator().manual_seed(seed))

        def loss_fn(logprobs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            losses.append(-logprobs.mean().item())
            return -logprobs.mean()

        engine.train_batch({"input_ids": ids}, loss_fn, lambda part: part["input_ids"].numel())
    return losses


def adapter(engine: Any) -> dict[str, torch.Tensor]:
    from archon_lora import get_adapter_state_dict

    return get_adapter_state_dict(engine.model, full=True)


def trains_and_resumes(model: Path, root: Path) -> dict[str, Any]:
    """The hooks, ``save`` and ``load``."""
    from areal.api import SaveLoadMeta
    from areal.utils.saver import Saver

    engine = engine_of(model, None)
    first = adapter(engine)
    base = {n: p.to_local().clone() for n, p in engine.model.named_parameters() if "lora_" not in n}
    before = train(engine, 0, 2)
    engine.set_version(2)
    recover = SaveLoadMeta(str(root / "recover"), "dcp", with_optim=True)
    engine.save(recover)
    engine.save(SaveLoadMeta(str(root / "peft"), "hf", False, base_model_path="org/base"))
    at_save = adapter(engine)
    went_on = train(engine, 2, 2)
    again = engine_of(model, None)
    again.load(recover)
    version = again.get_version()
    resumed = train(again, 2, 2)
    third = engine_of(model, None)
    third.load(SaveLoadMeta(str(root / "peft"), "hf", False))
    loaded = adapter(third)
    try:
        Saver("async").save(third, str(root / "bypass"))
        trapped = "no error"
    except ArchonLoraError as error:
        trapped = str(error)
    Saver("sync").save(third, str(root / "saver"))
    now = dict(engine.model.named_parameters())
    parameters = [p for g in engine.optimizer.param_groups for p in g["params"]]
    return {
        "finite": all(bool(torch.isfinite(t).all()) for t in first.values()),
        "first": first,
        "base_frozen": all(torch.equal(now[n].to_local(), value) for n, value in base.items()),
        "optimised": len(parameters),
        "losses": before,
        "went_on": went_on,
        "resumed": resumed,
        "version": version,
        "base_version": again._version,
        "loaded_same": all(torch.equal(loaded[n], at_save[n]) for n in at_save),
        "trapped": trapped,
        "calls": engine.calls,
    }


def updates(model: Path, root: Path) -> dict[str, Any]:
    """Versions that are handed over, one that fails, and what is left of them."""
    from areal.api import WeightUpdateMeta

    engine = engine_of(model, root / "versions")
    rollout = Rollout()
    meta = WeightUpdateMeta("disk", str(root / "weight_update"), use_lora=True, lora_name="lora")
    engine.connect_engine(rollout, meta)
    errors: dict[str, str] = {}
    for version in (0, 1, 2, 3):
        train(engine, version, 1)
        engine.update_weights(meta.with_version(version))
        engine.set_version(version)
    rollout.fails = True
    try:
        engine.update_weights(meta.with_version(4))
    except (RuntimeError, ArchonLoraError) as error:
        errors["failed"] = str(error)
    after_failure = (engine.get_version(), rollout.paused)
    rollout.fails = False
    engine.update_weights(meta.with_version(5))
    engine.set_version(5)
    for name, changed in {
        "again": {"version": 5},
        "xccl": {"type": "xccl", "version": 6},
        "whole": {"use_lora": False, "version": 6},
    }.items():
        wrong = meta.with_version(6)
        vars(wrong).update(changed)
        try:
            engine.update_weights(wrong)
        except ArchonLoraError as error:
            errors[name] = str(error)
    leased: dict[str, int] = {}
    if dist.get_rank() == 0:
        registry = Registry(str(root / "versions"))
        for path in sorted((root / "versions/adapters").glob("r-v*/")):
            leased[path.name] = len(registry.leases(path.name))
        registry.close()
    engine.destroy()
    dist.barrier()
    return {
        "loaded": [(name, path, paused) for name, path, paused, _ in rollout.loaded],
        "errors": errors,
        "after_failure": after_failure,
        "leased": leased,
        "last": adapter_at_end(rollout),
        "calls": engine.calls[-1],
    }


def adapter_at_end(rollout: Rollout) -> dict[str, torch.Tensor]:
    return rollout.loaded[-1][3] if rollout.loaded else {}


def plain_updates(model: Path, root: Path) -> dict[str, Any]:
    """Without a root AReaL's own directory is written, and AReaL deletes it."""
    from areal.api import WeightUpdateMeta

    engine = engine_of(model, None)
    rollout = Rollout()
    meta = WeightUpdateMeta("disk", str(root / "weight_update"), use_lora=True, lora_name="lora")
    engine.connect_engine(rollout, meta)
    train(engine, 0, 1)
    engine.update_weights(meta.with_version(1))
    mine = adapter(engine)
    return {
        "loaded": [(name, Path(path).name, paused) for name, path, paused, _ in rollout.loaded],
        "deleted": not (root / "weight_update_v1").exists(),
        "tensors": adapter_at_end(rollout),
        "adapter": mine,
    }


def stage_steps(engine: Any, count: int) -> None:
    """Updates that need no forward pass: a cut model computes only with its neighbours."""
    for _ in range(count):
        parameters = engine._get_all_parameters()
        sum((p.to_local() - 1).square().sum() for p in parameters).backward()
        engine.optimizer.step()
        engine.lr_scheduler.step()
        engine.optimizer.zero_grad()


def pipeline(model: Path, root: Path) -> dict[str, Any]:
    """Two stages of one model: what each of them saves is the whole adapter."""
    from areal.api import SaveLoadMeta, WeightUpdateMeta

    cut = {"pipeline_parallel_size": 2}
    engine = engine_of(model, root / "versions", cut)
    stage_steps(engine, 2)
    recover = SaveLoadMeta(str(root / "recover"), "dcp", with_optim=True)
    engine.save(recover)
    engine.save(SaveLoadMeta(str(root / "peft"), "hf", False))
    rollout = Rollout()
    meta = WeightUpdateMeta("disk", str(root / "weight_update"), use_lora=True, lora_name="lora")
    engine.connect_engine(rollout, meta)
    engine.update_weights(meta.with_version(1))
    saved = {n: p.to_local().clone() for n, p in named_adapter(engine).items()}
    stage_steps(engine, 1)
    end = {n: p.to_local().clone() for n, p in named_adapter(engine).items()}
    again = engine_of(model, None, cut)
    again.load(recover)
    stage_steps(again, 1)
    resumed = {n: p.to_local() for n, p in named_adapter(again).items()}
    sharded = engine_of(model, None)
    sharded.load(recover)
    whole = adapter(sharded)
    engine.destroy()
    return {
        "names": sorted(saved),
        "resumed": all(torch.equal(resumed[n], end[n]) for n in end),
        "resharded": all(torch.equal(whole[n], saved[n]) for n in saved),
        "whole": sorted(whole),
        "loaded": adapter_at_end(rollout),
    }


def small_model(root: Path) -> Path:
    """A directory of the stand-in's own family; the first rank writes it."""
    from areal.experimental.models.archon import small
    from safetensors.torch import save_file

    model = root / "small"
    if dist.get_rank() == 0:
        model.mkdir(parents=True)
        save_file(small.random_weights(), model / "model.safetensors")
        (model / "config.json").write_text('{"model_type": "small"}')
    dist.barrier()
    return model


def train_on(engine: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Loss and gradient norm of one update."""
    losses: list[float] = []

    def loss_fn(logprobs: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        losses.append(-logprobs.mean().item())
        return -logprobs.mean()

    stats = engine.train_batch({"input_ids": ids}, loss_fn, lambda part: 1)
    return losses[0], stats["grad_norm"]


def tensor_parallel(root: Path) -> dict[str, Any]:
    """Two ranks that hold the halves of each layer, beside one that holds all of it."""
    from areal.api import SaveLoadMeta
    from areal.experimental.models.archon import small
    from torch.distributed.tensor.parallel import ColwiseParallel

    from archon_lora import LoRAConfig, apply_lora, get_adapter_params
    from archon_lora.engine.areal_names import hf_module_names

    model = small_model(root)
    split = {"tensor_parallel_size": 2}
    settings = {"target_modules": ["all-linear"]}
    engine = engine_of(model, None, split, **settings)
    batches = [
        torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(s)) for s in range(4)
    ]

    trained = [train_on(engine, ids) for ids in batches[:3]]
    recover = SaveLoadMeta(str(root / "recover"), "dcp", with_optim=True)
    engine.save(recover)
    engine.save(SaveLoadMeta(str(root / "peft"), "hf", False))
    whole = adapter(engine)
    went_on = train_on(engine, batches[3])
    again = engine_of(model, None, split, **settings)
    again.load(recover)
    resumed = train_on(again, batches[3])
    sharded = engine_of(model, None, **settings)
    sharded.load(recover)
    resharded = adapter(sharded)

    reference = small.Small(small.SmallArgs())
    names = engine_of(model, None, **settings).state_dict_adapter
    reference.load_state_dict(names.from_hf(small.random_weights()))
    config = LoRAConfig(rank=3, alpha=6, target_modules="all-linear")
    apply_lora(reference, config, name_map=hf_module_names(names))
    alone = engine_of(model, None, **settings)
    alone.model_parts, alone.model = [reference], reference
    alone._create_optimizer(SimpleNamespace(total_train_steps=10))
    expected = [train_on(alone, ids) for ids in batches[:3]]
    params = get_adapter_params(reference)
    return {
        "trained": trained,
        "expected": expected,
        "worst": max(float((whole[n] - p.detach()).abs().max()) for n, p in params.items()),
        "moved": max(float(p.detach().abs().max()) for n, p in params.items() if "lora_b" in n),
        "resumed": (resumed, went_on),
        "resharded": all(torch.equal(resharded[n], whole[n]) for n in whole),
        "restored_style": small.ColwiseParallel is ColwiseParallel,
        "trains": sum(p.requires_grad for p in engine.model.parameters()),
        "placements": {
            name: str(parameter.placements)
            for name, parameter in named_adapter(engine).items()
            if name.startswith("layers.0.")
        },
    }


def named_adapter(engine: Any) -> dict[str, Any]:
    from archon_lora import get_adapter_params

    return {n: p for part in engine.model_parts for n, p in get_adapter_params(part).items()}


def without_lora(model: Path, root: Path) -> dict[str, Any]:
    """Everything is AReaL's own then."""
    from areal.api import SaveLoadMeta, WeightUpdateMeta

    engine = engine_of(model, root, use_lora=False)
    engine.connect_engine(Rollout(), None)
    engine.update_weights(WeightUpdateMeta("xccl"))
    engine.save(SaveLoadMeta(str(root / "whole"), "hf", False))
    engine.load(SaveLoadMeta(str(root / "whole"), "hf", False))
    engine.set_version(3)
    trains = sum(p.requires_grad for p in engine._get_all_parameters())
    return {
        "calls": engine.calls,
        "adapter": type(engine.state_dict_adapter).__name__,
        "trains": trains == len(list(engine.model.parameters())),
        "version": engine.get_version(),
    }


def refusals(model: Path) -> dict[str, str]:
    """Settings that cannot work, each with what was said."""
    from areal.api import FinetuneSpec, ParallelStrategy
    from areal.api.cli_args import TrainEngineConfig
    from areal.experimental.engine.archon_engine import ArchonPPOActor

    class LoRAActor(ArchonLoRA, ArchonPPOActor):
        pass

    said = {}
    for name, settings in {"critic": {"is_critic": True}, "peft": {"peft_type": "ia3"}}.items():
        try:
            LoRAActor(TrainEngineConfig(path=str(model), **(LORA | settings)))
        except ArchonLoraError as error:
            said[name] = str(error)
    for name, field, targets in (
        ("stage", "pipeline_parallel_size", r"model\.layers\.0\..*q_proj"),
    ):
        settings = LORA | {"target_modules": targets}
        engine = LoRAActor(TrainEngineConfig(path=str(model), **settings))
        engine.create_process_group(ParallelStrategy(**{field: 2}))
        try:
            engine.initialize(None, FinetuneSpec(1, 40, 4))
        except ArchonLoraError as error:
            said[name] = str(error)
    return said


def everything(rank: int, world: int, model: Path, root: Path) -> dict[str, Any]:
    """All of the above, one after the other."""
    sys.path.insert(0, str(SITE))
    return {
        "training": trains_and_resumes(model, root / "training"),
        "updates": updates(model, root / "updates"),
        "plain": plain_updates(model, root / "plain"),
        "tensor": tensor_parallel(root / "tensor"),
        "pipeline": pipeline(model, root / "pipeline"),
        "without": without_lora(model, root / "without"),
        "refused": refusals(model),
    }


def four_ranks(rank: int, world: int, root: Path) -> dict[str, Any]:
    """Tensor parallelism under FSDP2 on a mesh of two by two, beside FSDP2 alone on four."""
    sys.path.insert(0, str(SITE))
    from areal.api import SaveLoadMeta

    model = small_model(root)
    settings = {"target_modules": ["all-linear"]}
    split = engine_of(model, None, {"tensor_parallel_size": 2}, **settings)
    losses = []
    for number in range(3):
        # Both ranks of a tensor-parallel pair see the same rows.
        seed = torch.Generator().manual_seed(10 * number + dist.get_rank() // 2)
        ids = torch.randint(32, (2, 8), generator=seed)
        losses.append(train_on(split, ids)[0])
    recover = SaveLoadMeta(str(root / "recover"), "dcp", with_optim=True)
    split.save(recover)
    whole = adapter(split)
    sharded = engine_of(model, None, **settings)
    sharded.load(recover)
    again = adapter(sharded)
    apart = engine_of(model, None, **settings)
    expected = []
    for number in range(3):
        seed = torch.Generator().manual_seed(10 * number + dist.get_rank() // 2)
        ids = torch.randint(32, (2, 8), generator=seed)
        expected.append(train_on(apart, ids)[0])
    reference = adapter(apart)
    return {
        "losses": losses,
        "expected": expected,
        "worst": max(float((whole[n] - reference[n]).abs().max()) for n in whole),
        "resharded": all(torch.equal(again[n], whole[n]) for n in whole),
    }
