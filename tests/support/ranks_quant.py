"""Quantised bases, and what each rank of their tests does."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from archon_lora import LoRAConfig, adapter_shard_placement, apply_lora, get_adapter_params
from archon_lora.bases import unsplittable_weights

IN, OUT = 64, 256  # NF4 scales 64 values at once, and 256 of these scales
X = torch.randn(4, IN, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(IN, OUT)
        self.down_proj = nn.Linear(OUT, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.tanh(self.o_proj(x)))


def torchao_int8(net: nn.Module) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    return net


def torchao_nf4(net: nn.Module) -> nn.Module:
    # A function of the same name hides the module from attribute access.
    workflows = importlib.import_module("torchao.quantization.quantize_.workflows")
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nf4 = workflows.to_nf4(layer.weight.detach(), 64, 64)
            layer.weight = nn.Parameter(nf4, requires_grad=False)
    return net


def bitsandbytes_nf4(net: nn.Module) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    for name, layer in list(net.named_children()):
        quantised = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, bias=layer.bias is not None, quant_type="nf4"
        )
        quantised.load_state_dict(layer.state_dict())
        setattr(net, name, quantised.to("cpu"))  # the move quantises
    return net


def bitsandbytes_int8(net: nn.Module) -> nn.Module:
    bnb = importlib.import_module("bitsandbytes")
    for name, layer in list(net.named_children()):
        quantised = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
        )
        quantised.load_state_dict(layer.state_dict())
        setattr(net, name, quantised.to("cpu"))
    return net


QUANTISERS = [torchao_int8, torchao_nf4, bitsandbytes_nf4, bitsandbytes_int8]


def base_of(quantise: Callable[[nn.Module], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return quantise(Net())


def fill(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in get_adapter_params(net).values():
            parameter.normal_(std=0.1, generator=generator)
    return net


def sharded(rank: int, world: int) -> dict[str, object]:
    """Largest differences in output and gradients from one process, and what lies whole."""
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for quantise in QUANTISERS:
        results = []
        for split in (False, True):
            net = base_of(quantise)
            apply_lora(net, LoRAConfig(rank=4, alpha=8))
            fill(net)
            if split:
                place = adapter_shard_placement(net)
                whole = unsplittable_weights(net)
                fully_shard(net, mesh=mesh, shard_placement_fn=place, ignored_params=whole)
            out = net(X)
            out.square().sum().backward()
            grads = [p.grad for p in get_adapter_params(net).values()]
            results.append([out.detach(), *(_whole(grad) for grad in grads)])
        far = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
        found[quantise.__name__] = (far, not isinstance(net.o_proj.weight, DTensor))
    return found


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
