"""The gradient norm in one process, against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from archon_lora.engine.grad_norm import clip_grad_norm


def _params() -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (0, 4), (5,), (2, 2))]
    for param in params[:3]:
        param.grad = torch.randn_like(param) * 5
    return params


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_equals_torch_and_clips_alike(norm_type: float) -> None:
    ours, theirs = _params(), [p for p in _params() if p.numel()]
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type=norm_type)
    assert clip_grad_norm(ours, 1.0, norm_type=norm_type) == pytest.approx(float(wanted), rel=1e-6)
    for mine, other in zip([p for p in ours if p.numel()], theirs, strict=True):
        if other.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_below_the_limit_nothing_moves() -> None:
    params = _params()
    before = [p.grad.clone() for p in params[:3]]
    clip_grad_norm(params, 1e6)
    clip_grad_norm(params, None)
    assert all(torch.equal(b, p.grad) for b, p in zip(before, params, strict=False))


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_no_gradients_is_zero(norm_type: float) -> None:
    assert clip_grad_norm([], 1.0, norm_type=norm_type) == 0.0
    assert clip_grad_norm([nn.Parameter(torch.zeros(0, 3))], 1.0, norm_type=norm_type) == 0.0


def test_bf16_gradients_are_summed_in_fp32() -> None:
    param = nn.Parameter(torch.zeros(10_000, dtype=torch.bfloat16))
    param.grad = torch.full_like(param, 0.01)
    exact = float(param.grad.double().norm())
    assert clip_grad_norm([param], None) == pytest.approx(exact, rel=1e-5)


def test_bad_arguments_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match="norm_type must be 2 or inf, got 1"):
        clip_grad_norm([], 1.0, norm_type=1)
    with pytest.raises(ValueError, match=r"max_norm must be > 0, or None .*got 0"):
        clip_grad_norm([], 0)
