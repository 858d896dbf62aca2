"""One way from a wrapped name to the saved one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from archon_lora import canonical_fqn
from archon_lora.names import canonical_modules, canonical_parameters


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("", ""),
        ("layers.0.wq.weight", "layers.0.wq.weight"),
        ("_orig_mod.layers.0.wq.weight", "layers.0.wq.weight"),
        ("layers.0._orig_mod.wq.weight", "layers.0.wq.weight"),
        (
            "layers.0._checkpoint_wrapped_module._orig_mod.wq.lora_a.weight",
            "layers.0.wq.lora_a.weight",
        ),
        ("_fsdp_wrapped_module.layers.0", "layers.0"),
        ("layers.0.wq._orig_mod", "layers.0.wq"),
        # Whole components only: these are names that a model may have.
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("module.weight", "module.weight"),
    ],
)
def test_wrapper_components_disappear(given: str, wanted: str) -> None:
    assert canonical_fqn(given) == wanted
    assert canonical_fqn(canonical_fqn(given)) == wanted


def test_wrappers_are_passed_over_in_the_walk() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    names = [name for name, _ in canonical_modules(plain)]
    parameters = [name for name, _ in canonical_parameters(plain)]
    plain[0] = checkpoint_wrapper(plain[0])
    plain[1][0] = torch.compile(plain[1][0], backend="eager")
    wrapped = torch.compile(plain, backend="eager")
    walked = list(canonical_modules(wrapped))
    assert [name for name, _ in walked] == names
    assert {type(m) for name, m in walked if name in ("0", "1.0")} == {nn.Linear}
    assert [name for name, _ in canonical_parameters(wrapped)] == parameters
