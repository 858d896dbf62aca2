"""What the ranks of the engine's tests do; each function runs on every rank."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from archon_lora.engine import (
    SaveLoadMeta,
    is_lora_adapter_checkpoint,
    load_lora_adapter,
    save_lora_adapter,
)
from archon_lora.engine.agree import agree, barrier, gather_json
from archon_lora.engine.full_checkpoint import load_full_model, save_full_model
from archon_lora.engine.gather import Gather
from archon_lora.engine.grad_norm import clip_grad_norm
from support.engines import (
    LORA,
    batch_of,
    make_engine,
    masked_loss,
    masked_tokens,
    moved,
    my_rows,
    train,
    weights_of,
    whole,
)
from support.spawn import run_ranks

Call = tuple[Callable[..., object], tuple]


def several(rank: int, world: int, calls: list[Call]) -> list[object]:
    """Many calls on the same ranks: starting processes is what costs most here."""
    return [fn(rank, world, *args) for fn, args in calls]


def run_all(world: int, calls: dict[str, Call], *, timeout: float = 240) -> dict[str, list]:
    """The results of named calls on ``world`` ranks: by name, then by rank."""
    ranks = run_ranks(world, several, list(calls.values()), timeout=timeout)
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(calls)}


def reference_grads(rank: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Gradients of an adapter of this LoRA rank, the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (rank, 12), "b": (8, rank), "plain": (5,)}
    return {name: torch.randn(*shape, generator=generator) * 3 for name, shape in shapes.items()}


def reference_norm(grads: dict[str, torch.Tensor], norm_type: float) -> float:
    flat = torch.cat([g.flatten().double() for g in grads.values()])
    return float(torch.linalg.vector_norm(flat, norm_type))


def _sharded(grads: dict[str, torch.Tensor], mesh, placements) -> dict[str, nn.Parameter]:
    params = {}
    for name, grad in grads.items():
        if name == "plain":
            params[name] = nn.Parameter(torch.zeros_like(grad))
            params[name].grad = grad.clone()
        else:
            params[name] = nn.Parameter(
                distribute_tensor(torch.zeros_like(grad), mesh, placements, src_data_rank=None)
            )
            params[name].grad = distribute_tensor(
                grad.clone(), mesh, placements, src_data_rank=None
            )
    return params


def _full(grad: torch.Tensor) -> torch.Tensor:
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


def norms(rank: int, world: int, lora_rank: int, norm_type: float, layout: str) -> dict:
    """Norm and clipped gradients of one layout: ``shard``, ``hybrid`` or ``replicate``."""
    if layout == "hybrid":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("r", "s"))
        placements = [Replicate(), Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (world,))
        placements = [Shard(0) if layout == "shard" else Replicate()]
    params = _sharded(reference_grads(lora_rank), mesh, placements)
    empty = sum(p.grad.to_local().numel() == 0 for n, p in params.items() if n != "plain")
    norm = clip_grad_norm(params.values(), 1.0, norm_type=norm_type)
    clipped = {n: _full(p.grad).tolist() for n, p in params.items()}
    return {"norm": norm, "clipped": clipped, "empty": empty}


def norms_without_grads(rank: int, world: int, norm_type: float, have: list[int]) -> float:
    """Only the ranks in ``have`` hold gradients; rank 0 passes no parameters at all."""
    grads = reference_grads(2)
    params = []
    if rank != 0 or 0 in have:
        params = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
        if rank in have:
            for param, grad in zip(params, grads.values(), strict=True):
                param.grad = grad.clone()
    return clip_grad_norm(params, None, norm_type=norm_type)


def norms_nonfinite(rank: int, world: int, value: float, norm_type: float) -> tuple[float, bool]:
    """One bad number on the last rank; every rank must see it, and nothing may be scaled."""
    mesh = init_device_mesh("cpu", (world,))
    params = _sharded(reference_grads(world), mesh, [Shard(0)])
    local = params["a"].grad.to_local()
    if rank == world - 1:
        local[0, 0] = value
    before = params["b"].grad.to_local().clone()
    norm = clip_grad_norm(params.values(), 1e-3, norm_type=norm_type)
    return norm, bool(torch.equal(before, params["b"].grad.to_local()))


def agreement(rank: int, world: int) -> list[str]:
    """One rank fails; afterwards the group still works."""
    group = dist.new_group(backend="gloo")
    said = []
    error = OSError("disk full") if rank == world - 1 else None
    try:
        agree(group, error, what="writing", timeout=20)
    except Exception as caught:
        said.append(f"{type(caught).__name__}: {caught}")
    agree(group, None, what="writing again", timeout=20)
    said.append(repr(gather_json(group, {"rank": rank, "text": "é" * rank}, timeout=20)))
    return said


def late(rank: int, world: int) -> str:
    """The last rank never comes to the barrier."""
    group = dist.new_group(backend="gloo")
    dist.barrier(group)
    said = "absent" if rank == world - 1 else "no error"
    try:
        if rank != world - 1:
            barrier(group, timeout=2)
    except RuntimeError as error:
        said = str(error)
    dist.barrier()  # the late rank is there, only not where the others wait
    return said


def gathered(rank: int, world: int) -> dict | None:
    """Rows, columns, uneven rows and a plain tensor, brought to rank 0."""
    group = dist.new_group(backend="gloo")
    mesh = init_device_mesh("cpu", (world,))
    source = {
        "rows": torch.arange(24.0).view(8, 3),
        "columns": torch.arange(24.0, dtype=torch.bfloat16).view(3, 8),
        "uneven": torch.arange(6).view(3, 2),
        "scalar": torch.tensor(7.5),
        "eight": torch.arange(8.0).to(torch.float8_e4m3fn).view(4, 2),
    }
    dims = {"rows": 0, "columns": 1, "uneven": 0, "eight": 0}
    tensors = {
        name: distribute_tensor(t, mesh, [Shard(dims[name])], src_data_rank=None)
        if name in dims
        else t
        for name, t in source.items()
    }
    if rank == world - 1:
        tensors["only_here"] = torch.full((2,), 3.0)
    got = dict(Gather(tensors, group, timeout=20))
    if rank != 0:
        return {name: value is None for name, value in got.items()}
    return {
        name: name == "only_here"
        or (torch.equal(got[name].float(), source[name].float()), str(got[name].dtype))
        for name in got
    }


def train_and_look(rank: int, world: int, path: str, steps: int, options: dict) -> dict:
    """Train on this rank's share; what happened, and which weights moved."""
    with make_engine(path, **options) as engine:
        base = weights_of(engine, trainable=False)
        start = weights_of(engine, trainable=True)
        done = train(engine, steps, rows=4)
        after = weights_of(engine)
        return {
            "done": done,
            "start": {n: digest(v) for n, v in start.items()},
            "adapter": {n: after[n].float().tolist() for n in start},
            "base_same": all(torch.equal(after[n], v) for n, v in base.items()),
            "moved": sum(not torch.equal(after[n], v) for n, v in start.items()),
            "optimized": sum(len(g["params"]) for g in engine.optimizer.param_groups),
        }


def gradients(rank: int, world: int, path: str, options: dict) -> dict:
    """Loss, logits of one row on every rank, and whole gradients of one backward pass."""
    with make_engine(path, **options) as engine:
        moved(engine)
        mine = my_rows(batch_of(4), rank, world)
        loss = engine.forward_backward(mine, masked_loss, loss_weight_fn=masked_tokens)
        grads = {n: whole(p.grad) for n, p in engine.model.named_parameters() if p.requires_grad}
        return {"loss": loss, "logits": engine.forward(batch_of(1)), "grads": grads}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(bytes(data.flatten().tolist())).hexdigest()


def save_adapter(rank: int, world: int, path: str, out: str, options: dict) -> list[str]:
    """A sharded engine's adapter, saved; how its local shards look."""
    with make_engine(path, **options) as engine:
        moved(engine)
        save_lora_adapter(engine, out)
        # Committed for everybody when any rank returns.
        assert is_lora_adapter_checkpoint(out)
        return [f"{p.placements} {tuple(p.to_local().shape)}" for p in engine.trainable_params()]


def load_adapter(rank: int, world: int, path: str, source: str, options: dict) -> dict:
    """What a sharded engine holds after a load, whole, and that it computes with it."""
    with make_engine(path, **options) as engine:
        # Only the first rank needs to see the directory.
        load_lora_adapter(engine, source if rank == 0 else f"{source}-not-mounted-here")
        return {
            "adapter": weights_of(engine, trainable=True),
            "logits": engine.forward(batch_of(2)),
            "sharded": all(isinstance(p, DTensor) for p in engine.trainable_params()),
        }


def save_full(rank: int, world: int, path: str, out: str) -> None:
    with make_engine(path, lora=None) as engine:
        save_full_model(engine, out, max_file_bytes=8192)


def load_full(rank: int, world: int, path: str, source: str) -> dict:
    with make_engine(path, lora=None) as engine:
        load_full_model(engine, source)
        return weights_of(engine)


def failing_write(rank: int, world: int, path: str, out: str, full: bool) -> str:
    """The first rank cannot write: every rank hears of it, and the group still works."""
    with make_engine(path, lora=None if full else LORA) as engine:
        try:
            engine.save(SaveLoadMeta(path=out))
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "nothing"
        assert gather_json(engine.cpu_group, rank, timeout=20) == list(range(world))
        train(engine, 1)
        return said


def failing_load(rank: int, world: int, path: str, source: str) -> tuple[str, bool]:
    """An adapter that only the last rank's slice shows to be bad; nobody may change."""
    with make_engine(path) as engine:
        before = {n: p.to_local().clone() for n, p in engine.model.named_parameters()}
        try:
            load_lora_adapter(engine, source)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            said = "nothing"
        after = {n: p.to_local() for n, p in engine.model.named_parameters()}
        return said, all(torch.equal(after[n], v) for n, v in before.items())


def resume(rank: int, world: int, path: str, out: str, action: str, options: dict) -> dict:
    """``save``: train, save, go on; ``load``: load and go on."""
    settings = dict(options)
    meta = SaveLoadMeta(path=out, with_optim=True, weight_format=settings.pop("format", "hf"))
    with make_engine(path, **settings) as engine:
        if action == "save":
            train(engine, 2)
            engine.set_version(2)
            engine.save(meta)
        else:
            engine.load(meta)
        state = {
            "version": engine.get_version(),
            "adapter": weights_of(engine, trainable=True),
            "moments": {
                f"{index}.{key}": whole(value)
                for index, param in enumerate(engine.trainable_params())
                for key, value in engine.optimizer.state[param].items()
            },
            "lr": engine.lr_scheduler.get_last_lr(),
        }
        return {**state, "next": train(engine, 3, first=2)}


class RecordingSink:
    """Keeps what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def load_adapter(self, version, peft_config, tensors) -> None:
        self.calls.append((version, peft_config["r"], {k: digest(t) for k, t in tensors.items()}))


def hand_over(rank: int, world: int, path: str, where: list[int]) -> list[tuple]:
    """Sinks on some ranks."""
    with make_engine(path) as engine:
        moved(engine)
        sink = RecordingSink()
        if rank in where:
            engine.sinks.append(sink)
        engine.update_weights(3)
        assert engine.get_version() == 3
        return sink.calls


def bad_start(rank: int, world: int, path: str) -> str:
    """The last rank does not see the model directory."""
    engine = make_engine(path if rank < world - 1 else f"{path}-not-here", initialize=False)
    try:
        engine.initialize()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def uneven_batches(rank: int, world: int, path: str) -> str:
    """One rank has no rows: all must refuse together, and then go on."""
    with make_engine(path) as engine:
        rows = batch_of(2) if rank == 0 else {k: v[:0] for k, v in batch_of(2).items()}
        try:
            engine.train_batch(rows, masked_loss)
        except ValueError as error:
            said = str(error)
        train(engine, 1)
        return said


def while_default_group_is_busy(rank: int, world: int, path: str, out: str, what: str) -> float:
    """Save or load while the default group is in the middle of a collective.

    Rank 0 has entered an all-reduce that the others join only afterwards. Whatever the save or
    load sent over that group would be matched with it, and hang or mix numbers up.
    """
    with make_engine(path) as engine:
        moved(engine)
        if what == "load":
            save_lora_adapter(engine, out)
        number = torch.full((4,), float(rank + 1))
        work = dist.all_reduce(number, async_op=True) if rank == 0 else None
        if what == "save":
            save_lora_adapter(engine, out)
        else:
            load_lora_adapter(engine, out)
        if work is None:
            work = dist.all_reduce(number, async_op=True)
        work.wait()
        assert is_lora_adapter_checkpoint(out)
        return float(number.sum())


def absent_rank(rank: int, world: int, path: str, out: str, what: str) -> str:
    """The last rank never comes to the save or load; the others must not wait for ever."""
    with make_engine(path) as engine:
        if what == "load":
            save_lora_adapter(engine, out)
        # Only from here on, and from here together: a busy machine must not look like a lost rank.
        engine.config = dataclasses.replace(engine.config, barrier_timeout=2.0)
        dist.barrier()
        said = "absent" if rank == world - 1 else "no error"
        try:
            if rank != world - 1:
                (save_lora_adapter if what == "save" else load_lora_adapter)(engine, out)
        except RuntimeError as error:
            said = str(error)
        dist.barrier()  # the late rank is there, only not where the others wait
        return said


def one_after_another(rank: int, world: int, path: str, out: str, members: int) -> list[float]:
    """Engines over the first ranks, each with several saves, one after the other."""
    group = dist.new_group(list(range(members))) if members < world else None
    losses = []
    if rank < members:
        for number in range(2):
            engine = make_engine(path, initialize=False)
            engine.initialize(group)
            with engine:
                for _ in range(2):
                    losses.append(train(engine, 1)[0]["loss"])
                    engine.save(SaveLoadMeta(path=f"{out}/{number}", with_optim=True))
                engine.load(SaveLoadMeta(path=f"{out}/{number}", with_optim=True))
    dist.barrier()
    return losses
