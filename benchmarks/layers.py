"""Sections about the LoRA layer itself: forward and backward beside PEFT's and torchtune's."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archon_lora import LoRALinear

from .activations import kept_bytes
from .peers import first_line
from .processes import Settings
from .rounds import Sample, interleave

OURS = "archon_lora LoRALinear"
PEFT = "PEFT lora.Linear"
TORCHTUNE = "torchtune LoRALinear"
PEERS_FOLDER = Path(__file__).parent / ".peers"
"""Where ``make bench-peers`` puts torchtune, whose dependencies do not fit in with ours."""
TOKENS = 128
RANK = 16
FEATURES = ((896, 896), (896, 128), (896, 128), (896, 896), (896, 4864), (896, 4864), (4864, 896))
"""The linears of one block of a Qwen2-0.5B: query, key, value, output, gate, up, down."""
SMALL = ((64, 64),) * 7
"""So little arithmetic that what is timed is the way into it."""

Make = Callable[[int, int, torch.dtype], nn.Module]
"""A layer of in features, out features and the base's dtype; fp32 adapters, scaled by 2."""


@dataclass(frozen=True)
class Kind:
    """One way to run the layers.

    Attributes:
        name: what the tables call it.
        features: (in, out) of every layer.
        tokens: rows of every input.
        base: dtype of the base and of the input.
        compiled: by ``torch.compile``.
        times: passes in one sample, each a mean over them, after one that does not count.
    """

    name: str
    features: tuple[tuple[int, int], ...] = FEATURES
    tokens: int = TOKENS
    base: torch.dtype = torch.float32
    compiled: bool = False
    times: int = 1


KINDS = (
    Kind("eager"),
    Kind("compiled", compiled=True),
    Kind("eager, bf16 base", base=torch.bfloat16),
    Kind("eager, tiny", features=SMALL, tokens=16, times=50),
)


class Layers(nn.Module):
    """Layers side by side, each with an input of its own."""

    def __init__(self, make: Make, kind: Kind) -> None:
        super().__init__()
        made = [make(inputs, outputs, kind.base) for inputs, outputs in kind.features]
        self.layers = nn.ModuleList(made)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Map ``(tokens, in features)`` of every layer to ``(tokens, out features)``."""
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


class Trained:
    """Forward and backward of one implementation."""

    def __init__(self, implementation: str, make: Make, kind: Kind) -> None:
        self.name = trial_name(implementation, kind)
        torch.manual_seed(0)
        self._module = Layers(make, kind)
        self._inputs = [
            torch.randn(kind.tokens, inputs, dtype=kind.base, requires_grad=True)
            for inputs, _ in kind.features
        ]
        self._gradients = [
            torch.randn(kind.tokens, out, dtype=kind.base) for _, out in kind.features
        ]
        self.kept = kept_bytes(self._module, lambda: self._module(self._inputs))
        self._run = torch.compile(self._module) if kind.compiled else self._module
        self._times = kind.times
        self._leaves = [*self._inputs, *(p for p in self._module.parameters() if p.requires_grad)]

    def measure(self, number: int) -> Sample:
        """``total`` and ``cpu`` in milliseconds, and ``kept``, the activations' bytes."""
        del number
        if self._times > 1:
            self._step()  # the processor's caches hold another trial's code
        used = time.process_time()
        began = time.perf_counter()
        for _ in range(self._times):
            self._step()
        total = (time.perf_counter() - began) / self._times
        used = (time.process_time() - used) / self._times
        return {"total": 1e3 * total, "cpu": 1e3 * used, "kept": float(self.kept)}

    def _step(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None
        torch.autograd.backward(self._run(self._inputs), self._gradients)


def trial_name(implementation: str, kind: Kind) -> str:
    """What a trial is called in the tables."""
    return f"{implementation}, {kind.name}"


def ours(inputs: int, outputs: int, base: torch.dtype) -> nn.Module:
    """Our layer, as :data:`Make` says."""
    return LoRALinear(inputs, outputs, rank=RANK, alpha=2 * RANK, bias=False, dtype=base)


def _peft() -> Make:
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK)

    def make(inputs: int, outputs: int, base: torch.dtype) -> nn.Module:
        linear = nn.Linear(inputs, outputs, bias=False, dtype=base).requires_grad_(False)
        layer = Linear(linear, "default", config, r=RANK, lora_alpha=2 * RANK)
        layer.lora_A.float()  # as get_peft_model does it
        layer.lora_B.float()
        return layer

    return make


def _torchtune() -> Make:
    if PEERS_FOLDER.is_dir():
        sys.path.append(os.fspath(PEERS_FOLDER))  # last: what is installed anyway comes first
    from torchtune.modules.peft import LoRALinear as Theirs

    def make(inputs: int, outputs: int, base: torch.dtype) -> nn.Module:
        layer: nn.Module = Theirs(inputs, outputs, rank=RANK, alpha=2 * RANK).to(base)
        layer.get_parameter("weight").requires_grad_(False)
        return layer

    return make


def layers(settings: Settings) -> dict[str, Any]:
    """Every implementation in every kind; torchtune's has one dtype for base and adapter."""
    makers: dict[str, Make] = {OURS: ours}
    skipped = {}
    for name, load in {PEFT: _peft, TORCHTUNE: _torchtune}.items():
        try:
            makers[name] = load()
            makers[name](8, 8, torch.float32)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason
            makers.pop(name, None)
            skipped[name] = first_line(error)
    trials = [
        Trained(name, make, kind)
        for kind in KINDS
        for name, make in makers.items()
        if name != TORCHTUNE or kind.base is torch.float32
    ]
    rounds = interleave(trials, repeats=3 * settings.repeats, seconds=settings.seconds, warm=3)
    return {"rounds": rounds, "skipped": skipped, "tokens": TOKENS, "rank": RANK}
