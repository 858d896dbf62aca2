"""What each rank of the LoRA tests does; returns plain data for the parent to compare."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from archon_lora import (
    LoRAConfig,
    adapter_shard_placement,
    adapters_disabled,
    apply_lora,
    get_adapter_params,
    get_adapter_state_dict,
    initialise_adapters,
    iter_merged_weights,
    load_adapter_tensors,
    peft_export,
)
from archon_lora.errors import AdapterMismatch, TargetError


class Block(nn.Module):
    """Two projections of different fan-in; 12 is divisible by 2 and 4, 10 only by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 10)
        self.down = nn.Linear(10, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.output = nn.Linear(12, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


def base_net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(3)
    return Net().to(dtype)


def shard(net: Net, *, placed: bool, policy: MixedPrecisionPolicy | None = None) -> None:
    place = adapter_shard_placement(net) if placed else None
    for layer in net.layers:
        fully_shard(layer, mp_policy=policy or MixedPrecisionPolicy(), shard_placement_fn=place)
    fully_shard(net, mp_policy=policy or MixedPrecisionPolicy(), shard_placement_fn=place)


def digest(state: dict[str, Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(value.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in state.items()
    }


def init_digests(rank: int, world: int, config: LoRAConfig, placed: bool) -> object:
    """Built on meta, sharded, materialised, initialised: digests, and what the base became."""
    with torch.device("meta"):
        net = Net()
    apply_lora(net, config)
    shard(net, placed=placed)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" not in name:
                parameter.fill_(7.0)
    torch.manual_seed(100 + rank)  # the ranks' own generators must not matter
    before = torch.get_rng_state()
    initialise_adapters(net)
    frozen = [p for n, p in net.named_parameters() if "lora_" not in n]
    untouched = all(bool((p.to_local() == 7.0).all()) for p in frozen)
    return (
        digest(get_adapter_state_dict(net, full=True)),
        untouched and bool(torch.equal(before, torch.get_rng_state())),
    )


def init_digests_2d(rank: int, world: int, config: LoRAConfig) -> object:
    """TP placements made by hand, then FSDP2 over the other mesh dimension."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with torch.device("meta"):
        net = Net()
    apply_lora(net, config)
    for layer in net.layers:
        # Column-wise: A whole, B split on out. Row-wise: A split on in, B whole.
        for module, (a, b) in (
            (layer.up, (Replicate(), Shard(0))),
            (layer.down, (Shard(1), Replicate())),
        ):
            for factor, placement in ((module.lora_a, a), (module.lora_b, b)):
                whole = factor.weight.detach()
                factor.weight = nn.Parameter(distribute_tensor(whole, mesh["tp"], [placement]))
            for name, placement in (("weight", Shard(0)), ("bias", Shard(0))):
                whole = getattr(module, name)
                if whole is not None:
                    split = distribute_tensor(whole.detach(), mesh["tp"], [placement])
                    setattr(module, name, nn.Parameter(split, requires_grad=False))
        fully_shard(layer, mesh=mesh["dp"])
    net.to_empty(device="cpu")
    initialise_adapters(net)
    dims = {len(p.placements) for p in get_adapter_params(net).values() if isinstance(p, DTensor)}
    return digest(get_adapter_state_dict(net, full=True)), sorted(dims)


def train(
    rank: int,
    world: int,
    config: LoRAConfig,
    base_dtype: torch.dtype,
    mixed: bool,
    placed: bool,
    wrap: str,
) -> object:
    """Five AdamW steps on the same global batch; losses, final adapter, base unchanged."""
    torch.manual_seed(0)
    net = base_net(base_dtype)
    apply_lora(net, config)
    if wrap == "ac":
        for i, layer in enumerate(net.layers):
            net.layers[i] = checkpoint_wrapper(layer)
    if wrap == "compile":
        for i, layer in enumerate(net.layers):
            net.layers[i] = torch.compile(layer, backend="eager")
    if wrap == "compile-in-place":
        for layer in net.layers:
            layer.compile(backend="eager")
    policy = None
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if world > 1:
        shard(net, placed=placed, policy=policy)
    base = {
        n: (p.to_local() if isinstance(p, DTensor) else p).clone()
        for n, p in net.named_parameters()
        if not p.requires_grad
    }
    params = get_adapter_params(net)
    optimizer = torch.optim.AdamW(params.values(), lr=1e-2)
    torch.manual_seed(9)
    batch = torch.randn(8, 12)
    target = torch.randn(8, 8)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    losses, norms = [], []
    dtype = torch.bfloat16 if mixed else base_dtype
    for _ in range(5):
        out = net(batch[mine].to(dtype)).float()
        loss = (out - target[mine]).square().mean()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(params.values(), 1.0)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        dtypes = {p.grad.dtype for p in params.values()}
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total) / world)
    with adapters_disabled(net):
        reference = net(batch[mine].to(dtype)).float()
    bare = base_net(base_dtype)
    expected = bare.to(dtype)(batch[mine].to(dtype)).float()
    # The forward above left the root gathered; the parameters must be the shards all the same.
    same_objects = all(p is params[n] for n, p in get_adapter_params(net).items())
    kept = all(
        bool(torch.equal(base[n], p.to_local() if isinstance(p, DTensor) else p))
        for n, p in net.named_parameters()
        if not p.requires_grad
    )
    return {
        "losses": losses,
        "norms": norms,
        "names": list(params),
        "dtypes": sorted(str(d) for d in dtypes),
        "param_dtypes": sorted({str(p.dtype) for p in params.values()}),
        "base_kept": kept and same_objects,
        "reference": float((reference - expected).detach().abs().max()),
        "state": {k: v.tolist() for k, v in get_adapter_state_dict(net, full=True).items()},
    }


def placements(rank: int, world: int, config: LoRAConfig) -> object:
    """Placement and local shape of every adapter parameter."""
    net = base_net()
    apply_lora(net, config)
    shard(net, placed=True)
    return {
        name: (str(p.placements), tuple(p.to_local().shape))
        for name, p in get_adapter_params(net).items()
    }


def load_and_merge(rank: int, world: int, config: LoRAConfig, placed: bool) -> object:
    """A normalised file loads into shards; gathered values, merged weights, refusals."""
    filled = base_net()
    apply_lora(filled, config)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in get_adapter_params(filled).values():
            parameter.normal_()
    export = peft_export(filled)
    values = get_adapter_state_dict(filled)
    file = {}
    for rule in export["rules"]:
        value = values[rule["source"]].float() * rule["scale"]
        if rule["pad_dim"] is not None:
            extra = list(value.shape)
            extra[rule["pad_dim"]] = rule["pad_to"] - extra[rule["pad_dim"]]
            value = torch.cat([value, torch.zeros(extra)], rule["pad_dim"])
        file[rule["key"]] = value
    merged_alone = dict(iter_merged_weights(filled))
    net = base_net()
    apply_lora(net, config)
    shard(net, placed=placed)
    before = digest(get_adapter_state_dict(net, full=True))
    broken = dict(file)
    broken.popitem()
    try:
        load_adapter_tensors(net, broken, export["peft_config"])
        refused = False
    except AdapterMismatch:
        refused = digest(get_adapter_state_dict(net, full=True)) == before
    load_adapter_tensors(net, file, export["peft_config"])
    loaded = get_adapter_state_dict(net, full=True)
    merged = dict(iter_merged_weights(net))
    try:
        apply_lora(net, replace(config))
        twice = False
    except TargetError:
        twice = True
    return {
        "refused": refused,
        "twice": twice,
        "loaded": max(float((loaded[k] - values[k]).abs().max()) for k in values),
        "same_names": list(loaded) == list(values),
        "merged": max(float((merged[k] - merged_alone[k]).abs().max()) for k in merged_alone),
        "merged_names": sorted(merged) == sorted(merged_alone),
        "rules": peft_export(net) == export,
    }


def sharded_refusal(rank: int, world: int) -> str:
    """apply_lora() after fully_shard is refused."""
    net = base_net()
    fully_shard(net)
    try:
        apply_lora(net, LoRAConfig(rank=2))
    except TargetError as error:
        return str(error)
    return "accepted"


def scenarios(rank: int, world: int, calls: dict[object, tuple[str, tuple]]) -> dict:
    """Several of the above in one group, since starting processes takes most of the time."""
    return {key: globals()[name](rank, world, *args) for key, (name, args) in calls.items()}
