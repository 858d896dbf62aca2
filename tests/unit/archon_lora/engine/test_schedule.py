"""The learning rate at every update, and its state in a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from archon_lora.engine.config import OptimizerConfig
from archon_lora.engine.schedule import build_optimizer, build_scheduler, lr_factor


def _factors(**options: object) -> list[float]:
    config = OptimizerConfig(**options)
    return [lr_factor(config, update) for update in range(12)]


def test_constant_after_a_linear_rise() -> None:
    assert _factors(warmup_steps=3)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert _factors() == [1.0] * 12


def test_linear_ends_at_the_floor_and_stays() -> None:
    factors = _factors(schedule="linear", warmup_steps=2, total_steps=10, min_lr_ratio=0.2)
    assert factors[2] == 1.0
    assert factors[6] == pytest.approx(0.6)
    assert factors[10] == factors[11] == pytest.approx(0.2)


def test_cosine_is_half_way_down_in_the_middle() -> None:
    factors = _factors(schedule="cosine", total_steps=10)
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 10)))
    assert factors[10] == factors[11] == pytest.approx(0.0)


def test_scheduler_follows_and_its_state_is_plain_json() -> None:
    config = OptimizerConfig(lr=0.1, schedule="linear", warmup_steps=1, total_steps=5)
    runs = []
    for _ in range(2):
        optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], config)
        runs.append((optimizer, build_scheduler(optimizer, config)))
    (optimizer, scheduler), (other, resumed) = runs
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.1 * lr_factor(config, u) for u in range(4)])
    resumed.load_state_dict(json.loads(json.dumps(scheduler.state_dict())))
    other.load_state_dict(optimizer.state_dict())
    for each, its in ((optimizer, scheduler), (other, resumed)):
        each.step()
        its.step()
    assert resumed.get_last_lr() == scheduler.get_last_lr()
