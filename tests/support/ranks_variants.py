"""What each rank of the tests of several adapters does; returns plain data for the parent."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from archon_lora import (
    LoRAConfig,
    TargetError,
    adapter_mode,
    add_adapter,
    apply_lora,
    copy_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    peft_export,
    remove_adapter,
)
from ckpt import CheckpointManager, TrainState
from support.ranks_lora import base_net, shard

POLICY = LoRAConfig(rank=3, alpha=6, seed=1, target_modules=["up", "down"])
OTHER = LoRAConfig(rank=1, alpha=4, seed=2, target_modules=["down", "output"], use_rslora=True)
MODES = ("policy", "other", "reference", "base")


def adapted(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The policy, another adapter that trains, and a frozen reference like the policy."""
    net = base_net(dtype)
    apply_lora(net, POLICY)
    add_adapter(net, "other", OTHER)
    add_adapter(net, "reference", POLICY, trainable=False)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in get_adapter_params(net, frozen=True).values():
            parameter.normal_(std=0.3, generator=generator)
    return net


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 8, generator=generator)


def outputs(net: nn.Module, x: Tensor) -> dict[str, list[float]]:
    """What the model computes in each mode."""
    found = {}
    for mode in MODES:
        with adapter_mode(net, mode), torch.no_grad():
            found[mode] = net(x).float().flatten().tolist()
    return found


def whole(net: nn.Module) -> dict[str, list[float]]:
    state: dict[str, Tensor] = {}
    for name in ("default", "other", "reference"):
        state |= get_adapter_state_dict(net, full=True, adapter=name)
    return {name: value.flatten().tolist() for name, value in state.items()}


def steps(
    net: nn.Module, optimizer: torch.optim.Optimizer, modes: tuple[str, ...], mine: slice
) -> list[list[str]]:
    """One update in each mode; which adapters' parameters had gradients."""
    x, target = batch()
    used = []
    for mode in modes:
        with adapter_mode(net, mode):
            (net(x[mine]) - target[mine]).square().mean().backward()
        named = {
            name: [p.grad is not None for p in get_adapter_params(net, adapter=name).values()]
            for name in ("default", "other", "reference")
        }
        used.append([name for name, found in named.items() if all(found)])
        assert all(any(found) == all(found) for found in named.values())
        optimizer.step()
        optimizer.zero_grad()
    return used


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(get_adapter_params(net).values(), lr=1e-2)


def train(rank: int, world: int, root: str, compiled: bool) -> dict[str, object]:
    """Three updates of two adapters by turns, a save, and two updates more."""
    net = adapted()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    if compiled:
        for layer in net.layers:
            layer.compile(backend=backend)
    if world > 1:
        shard(net, placed=True)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    x, _ = batch()
    before = outputs(net, x)
    first = len(graphs)
    for _ in range(3):
        outputs(net, x)
    repeated = len(graphs) - first
    optimizer = optimizer_of(net)
    used = steps(net, optimizer, ("policy", "other", "policy"), mine)
    state = TrainState(net, optimizer, export=peft_export(net, adapter="other"))
    with CheckpointManager(root, process_group=dist.group.WORLD, fresh=True) as manager:
        manager.save(0, state, publish=True).wait()
    saved = whole(net)
    steps(net, optimizer, ("other", "policy"), mine)
    after = whole(net)
    copy_adapter(net, "default", "reference")
    copied = outputs(net, x)
    refused = []
    for call in (
        lambda: add_adapter(net, "late", OTHER),
        lambda: remove_adapter(net, "other"),
    ):
        try:
            call()
        except TargetError as error:
            refused.append(str(error))
    return {
        "before": before,
        "graphs": (first, repeated),
        "used": used,
        "saved": saved,
        "after": after,
        "copied": copied["policy"] == copied["reference"] != before["reference"],
        "refused": refused,
    }


def resume(rank: int, world: int, root: str) -> dict[str, object]:
    """A restore on this many ranks, and the same two updates."""
    net = adapted()
    with torch.no_grad():
        for parameter in get_adapter_params(net, frozen=True).values():
            parameter.zero_()
    if world > 1:
        shard(net, placed=True)
    optimizer = optimizer_of(net)
    with CheckpointManager(root, process_group=dist.group.WORLD) as manager:
        assert manager.restore(TrainState(net, optimizer)) == 0
    restored = whole(net)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    steps(net, optimizer, ("other", "policy"), mine)
    return {"restored": restored, "after": whole(net)}


def mixed(rank: int, world: int) -> dict[str, object]:
    """A bf16 base with fp32 adapters: what the factors are multiplied in, and what is kept."""
    net = adapted(torch.bfloat16)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard(net, placed=True, policy=policy)
    seen: dict[str, set[str]] = {}
    for name, module in net.named_modules():
        if name.endswith(("lora_a", "lora_b")):

            def note(
                module: nn.Module, given: tuple[Tensor], out: Tensor, name: str = name
            ) -> None:
                kinds = (given[0].dtype, module.weight.dtype, out.dtype)
                seen.setdefault(name.split("adapters.")[-1], set()).update(map(str, kinds))

            module.register_forward_hook(note)
    x, _ = batch()
    results = {}
    for mode in ("policy", "other"):
        with adapter_mode(net, mode):
            results[mode] = net(x.bfloat16()).dtype
            net(x.bfloat16()).float().square().mean().backward()
    return {
        "outputs": sorted({str(dtype) for dtype in results.values()}),
        "multiplied": sorted({kind for kinds in seen.values() for kind in kinds}),
        "stored": sorted({str(p.dtype) for p in get_adapter_params(net, frozen=True).values()}),
        "gradients": sorted({str(p.grad.dtype) for p in get_adapter_params(net).values()}),
    }


def scenarios(rank: int, world: int, calls: dict[str, tuple[str, tuple]]) -> dict[str, object]:
    """Several of the above in one group, since starting processes takes most of the time."""
    return {key: globals()[name](rank, world, *args) for key, (name, args) in calls.items()}
