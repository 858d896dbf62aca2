"""Every setting is checked when it is made; the error says what was given and what is wanted."""

from __future__ import annotations

import dataclasses
import math

import pytest

from archon_lora.config import LoRAConfig
from archon_lora.engine import EngineConfig, OptimizerConfig, SaveLoadMeta
from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 0.0, r"lr must be a number > 0, got 0\.0"),
        ("lr", "1e-4", "lr must be a number > 0, got '1e-4'"),
        ("lr", math.nan, "lr must be a number > 0, got nan"),
        ("betas", (0.9, 1.0), r"betas must be two numbers in \[0, 1\)"),
        ("betas", (0.9,), "betas must be two numbers"),
        ("eps", -1.0, "eps must be a number > 0"),
        ("weight_decay", -0.1, "weight_decay must be a number >= 0"),
        ("grad_clip", 0, "grad_clip must be a number > 0, or None for no clipping, got 0"),
        ("norm_type", 1.0, r"norm_type must be 2 or inf, got 1\.0"),
        ("schedule", "step", "schedule must be one of constant, linear, cosine, got 'step'"),
        ("warmup_steps", -1, "warmup_steps must be an integer >= 0, got -1"),
        ("warmup_steps", True, "warmup_steps must be an integer >= 0, got True"),
        ("total_steps", 0, r"total_steps must be an integer above warmup_steps \(0\)"),
        ("min_lr_ratio", 1.5, r"min_lr_ratio must be in \[0, 1\], got 1\.5"),
        ("on_nonfinite", "ignore", "on_nonfinite must be one of raise, skip, got 'ignore'"),
    ],
)
def test_optimizer_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{field: value})


def test_a_decay_needs_its_end() -> None:
    with pytest.raises(ValueError, match="total_steps must be given for schedule='cosine'"):
        OptimizerConfig(schedule="cosine")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("path", "", "path must be a model directory, got ''"),
        ("dtype", "fp8", "dtype must be one of float32, bfloat16, got 'fp8'"),
        ("device", "tpu", "device must be one of auto, cpu, cuda, got 'tpu'"),
        ("lora", {"rank": 8}, r"lora must be a LoRAConfig, or None, got \{'rank': 8\}"),
        ("parallel", {"tp": 2}, r"parallel must be ParallelDims, got \{'tp': 2\}"),
        ("optimizer", "adamw", "optimizer must be an OptimizerConfig, or None"),
        ("micro_batches", 0, "micro_batches must be an integer >= 1, got 0"),
        ("compile", 1, "compile must be true or false, got 1"),
        ("seed", -1, "seed must be an integer >= 0, got -1"),
        ("barrier_timeout", 0, "barrier_timeout must be a number > 0, got 0"),
        ("temperature", math.inf, "temperature must be a number > 0, got inf"),
    ],
)
def test_engine_values(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**{"path": "model", field: value})


def test_configs_are_frozen_and_compare_by_value() -> None:
    first = EngineConfig(path="model", lora=LoRAConfig(rank=8))
    assert first == EngineConfig(path="model", lora=LoRAConfig(rank=8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.path = "other"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": ""}, "path must name a directory"),
        ({"path": "x", "weight_format": "pt"}, "weight_format must be 'hf' or 'dcp', got 'pt'"),
        ({"path": "x", "naive_distributed": True}, "naive_distributed=True is not supported"),
    ],
)
def test_save_load_meta(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SaveLoadMeta(**values)


def test_dropout_does_not_go_with_tensor_parallelism() -> None:
    lora = LoRAConfig(rank=2, dropout=0.1)
    EngineConfig(path="model", lora=lora, parallel=ParallelDims(dp_replicate=2))
    with pytest.raises(ParallelConfigError, match=r"lora.dropout=0.1 does not go with parallel.tp"):
        EngineConfig(path="model", lora=lora, parallel=ParallelDims(tp=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pp_stages": 2}, "pp_stages=2 and parallel.pp=1: 'interleaved' is for several stages"),
        ({"pp": 2, "pp_stages": 2, "micro_batches": 2}, "pp_schedule='1f1b' with pp_stages=2"),
        ({"pp": 2, "pp_schedule": "interleaved"}, "with pp_stages=1 and parallel.pp=2"),
        ({"pp": 2}, "wants at least parallel.pp=2 micro_batches, got 1; 'gpipe' takes any number"),
        (
            {"pp": 2, "pp_stages": 2, "pp_schedule": "interleaved", "micro_batches": 5},
            "a multiple of parallel.pp=2, or to be below twice that, got 5",
        ),
        ({"pp": 2, "tp": 2, "sequence_parallel": True, "micro_batches": 2}, "whole sequences"),
    ],
)
def test_schedules_that_cannot_be(values: dict, message: str) -> None:
    dims = {k: values.pop(k) for k in ("pp", "tp", "sequence_parallel") if k in values}
    with pytest.raises(ParallelConfigError, match=message):
        EngineConfig(path="model", parallel=ParallelDims(**dims), **values)


def test_schedules_that_can_be() -> None:
    for values in (
        {"pp_schedule": "gpipe"},
        {"micro_batches": 2},
        {"pp_schedule": "interleaved", "pp_stages": 2, "micro_batches": 3},
        {"pp_schedule": "interleaved", "pp_stages": 2, "micro_batches": 4},
    ):
        EngineConfig(path="model", parallel=ParallelDims(pp=2), **values)
    EngineConfig(path="model", pp_schedule="gpipe")
