"""Names, what is saved, optimizer state by name, and random number generators."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.tiny_run import EXPORT, Tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ckpt import AdapterExport, BaseIdentity, ConfigError, StateError, TensorRule, TrainState
from ckpt.fqn import canonical_fqn
from ckpt.optim import apply_optimizer, group_problem, optimizer_values, state_target
from ckpt.rng import apply_rng, capture_rng, derive_rng
from ckpt.state import decode_state, encode_state


def names(model, **kwargs):
    return sorted(TrainState(model, **kwargs).live().tensors)


@pytest.mark.parametrize(
    ("name", "ddp", "want"),
    [
        ("a.weight", (), "a.weight"),
        ("_orig_mod.a.weight", (), "a.weight"),
        ("l.0._checkpoint_wrapped_module.a.w", (), "l.0.a.w"),
        ("_fsdp_wrapped_module.l._orig_mod._checkpoint_wrapped_module.w", (), "l.w"),
        ("module.a", (), "module.a"),
        ("module.a", ("",), "a"),
        ("module.module.a", ("",), "module.a"),
        ("x.module.a", ("x",), "x.a"),
        ("y.module.a", ("x",), "y.module.a"),
        ("not_orig_mod.w", (), "not_orig_mod.w"),
    ],
)
def test_canonical_names(name, ddp, want):
    assert canonical_fqn(name, ddp) == want


def test_wrappers_never_reach_a_name():
    plain = names(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    wrapped = nn.Sequential(checkpoint_wrapper(nn.Linear(2, 2)), compiled)
    assert names(wrapped) == plain
    assert names(torch.compile(wrapped, backend="eager")) == plain


def _model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 3)))
    model.add_module("spare", nn.Linear(2, 2))
    return model


def _rename(model):
    model._modules["other"] = model._modules.pop("spare")


def _swap(model):
    model._modules["0"], model._modules["spare"] = model._modules["spare"], model._modules["0"]


CHANGES = {
    "a parameter is frozen": lambda m: m[0].weight.requires_grad_(False),
    "a parameter is replaced": lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 2))),
    "a parameter is removed": lambda m: m[0].register_parameter("bias", None),
    "a parameter is added deep down": lambda m: m[2][0].register_parameter(
        "extra", nn.Parameter(torch.ones(1))
    ),
    "parameters are tied": lambda m: setattr(m.spare, "weight", m[0].weight),
    "a module is replaced": lambda m: setattr(m, "spare", nn.Linear(2, 5)),
    "a module is added": lambda m: m[2].append(nn.Linear(1, 1)),
    "a module is removed": lambda m: m._modules.pop("spare"),
    "a module gets another name": _rename,
    "two modules change places": _swap,
    "a module is wrapped": lambda m: m._modules.__setitem__("0", checkpoint_wrapper(m[0])),
    "a buffer is added": lambda m: m[0].register_buffer("b", torch.ones(1)),
    "a buffer stops to be persistent": lambda m: m[1]._non_persistent_buffers_set.add(
        "running_mean"
    ),
    "a buffer is replaced": lambda m: setattr(m[1], "running_mean", torch.ones(2)),
    "the table of parameters is replaced": lambda m: setattr(
        m[0], "_parameters", {"weight": nn.Parameter(torch.ones(1))}
    ),
    "a module becomes an adapter": lambda m: (
        [p.requires_grad_(False) for p in m[1].parameters()],
        setattr(m[1], "adapter_params", list),
    ),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_walked_again(change, wrapped):
    model = _model()
    if wrapped:
        model.append(checkpoint_wrapper(nn.Linear(2, 2)))
    state = TrainState(model)
    state.live()
    change(model)
    now, fresh = state.live().tensors, TrainState(model).live().tensors
    assert list(now) == list(fresh)
    assert all(now[name] is fresh[name] for name in fresh)


def test_an_unchanged_model_is_walked_once(monkeypatch):
    model = _model()
    model.append(checkpoint_wrapper(nn.Linear(2, 2)))
    state = TrainState(model)
    first = state.live().tensors
    monkeypatch.setattr("ckpt.fqn.trainable", lambda model: pytest.fail("walked again"))
    assert list(state.live().tensors) == list(first)


def test_a_class_with_members_of_its_own_is_walked_every_time():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.store = {"w": nn.Parameter(torch.ones(1))}

        def named_parameters(self, *args, **kwargs):
            return iter(self.store.items())

    model = Hidden()
    state = TrainState(model)
    assert list(state.live().tensors) == ["model.w"]
    model.store["v"] = nn.Parameter(torch.ones(1))
    assert list(state.live().tensors) == ["model.w", "model.v"]


def test_frozen_parameters_are_left_out_and_buffers_of_what_trains_come_along():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.tuned, self.frozen = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
            self.frozen.requires_grad_(False)

    found = names(Mixed())
    assert "model.tuned.running_mean" in found
    assert not [name for name in found if "frozen" in name]
    assert "model.steps" in names(Tiny())
    assert "model.scratch" not in names(Tiny())  # not persistent
    full = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    assert "model.1.running_mean" in names(full)  # nothing frozen: all of it is saved


def test_an_adapter_modules_buffers_come_along():
    class Adapter(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.requires_grad_(False)
            self.inner = nn.Linear(2, 2)
            self.register_buffer("mask", torch.ones(2))

        def adapter_params(self):
            return ["inner.weight", "inner.bias"]

    assert names(Adapter()) == ["model.inner.bias", "model.inner.weight", "model.mask"]


def test_nothing_to_train_is_an_error():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(StateError, match="no parameter that requires a gradient"):
        TrainState(model).live()


def test_meta_tensors_and_double_names_are_refused():
    with pytest.raises(StateError, match="meta device"):
        TrainState(nn.Linear(2, 2, device="meta")).live()
    with pytest.raises(StateError, match=r"two tensors .* 'weight'"):
        TrainState([nn.Linear(2, 2), nn.Linear(2, 2)]).live()


def test_an_optimizer_of_another_model_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(7, 2).parameters())
    with pytest.raises(StateError, match=r"parameter 0 of optimizer group 0 \(shape \(2, 7\)\)"):
        TrainState(nn.Linear(7, 2), optimizer).live()


def test_arguments_are_checked():
    for bad in ({"extra": [1]}, {"base": {"name": "x"}}, {"per_rank": {"x": object()}}):
        with pytest.raises(ConfigError):
            TrainState(nn.Linear(2, 2), **bad)
    with pytest.raises(ConfigError, match="scheduler must have state_dict"):
        TrainState(nn.Linear(2, 2), scheduler=object())
    with pytest.raises(ConfigError, match="rules"):
        TrainState(nn.Linear(2, 2), export={"peft_config": {}}).export()


def test_base_and_export_may_be_plain_mappings():
    rule = {"source": "a", "key": "base_model.model.x.lora_A.weight"}
    state = TrainState(
        Tiny(),
        base={"name": "n", "config_hash": "c"},
        export={"peft_config": {"r": 3}, "rules": [rule]},
    )
    assert state.base == BaseIdentity("n", "c")
    assert state.export() == AdapterExport({"r": 3}, (TensorRule(**rule),))
    model = Tiny()
    model.adapter_export = lambda: {"peft_config": {}, "rules": []}
    assert TrainState(model).export() == AdapterExport({}, ())
    assert TrainState(model, export=EXPORT).export() is EXPORT
    assert TrainState(Tiny()).export() is None


def test_policy_version_is_an_integer_or_none():
    for value, want in ((3, 3), (None, None), (True, None), ("3", None)):
        assert TrainState(Tiny(), extra={"policy_version": value}).policy_version == want


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
    "adagrad": torch.optim.Adagrad,
    "rprop": torch.optim.Rprop,
    "nadam": torch.optim.NAdam,
    "tensor lr": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
}


def step(model, optimizer, count):
    torch.manual_seed(3)
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_goes_on_exactly(tmp_path, kind):
    from ckpt import CheckpointManager

    def build():
        model = Tiny()
        optimizer = OPTIMIZERS[kind]([p for p in model.parameters() if p.requires_grad])
        return model, optimizer, TrainState(model, optimizer)

    model, optimizer, state = build()
    step(model, optimizer, 3)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state)
    step(model, optimizer, 3)
    again, fresh, restored = build()
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(restored) == 0
    step(again, fresh, 3)
    assert torch.equal(model.a, again.a)
    assert torch.equal(model.b, again.b)


def test_hyperparameters_follow_the_names_not_the_group_numbers():
    model = Tiny()
    saved_by = torch.optim.AdamW([{"params": [model.a], "lr": 0.1}, {"params": [model.b]}], lr=0.2)
    params = {"a": model.a, "b": model.b}
    saved = optimizer_values(saved_by, params)
    live = torch.optim.AdamW([{"params": [model.b]}, {"params": [model.a]}], lr=9.0, foreach=True)
    assert group_problem(live, params, saved) is None
    apply_optimizer(live, params, saved, {})
    assert [group["lr"] for group in live.param_groups] == [0.2, 0.1]
    assert live.param_groups[0]["foreach"], "the kernel stays the live one's choice"
    joined = torch.optim.AdamW([model.a, model.b])
    assert "different 'lr'" in group_problem(joined, params, saved)
    other = torch.optim.SGD([model.a, model.b])
    assert "saved with AdamW" in group_problem(other, params, saved)


def test_targets_of_optimizer_tensors():
    model = Tiny()
    params = {"a": model.a}
    optimizer = torch.optim.AdamW([model.a])
    target = state_target(optimizer, params, "a", "exp_avg", (3, 6), torch.float32)
    assert target.shape == (3, 6)
    assert not target.requires_grad
    assert optimizer.state == {}, "nothing live changes yet"
    assert state_target(optimizer, params, "a", "step", (), torch.float32).shape == ()
    model.a.grad = torch.ones_like(model.a)
    optimizer.step()
    live = optimizer.state[model.a]["exp_avg"]
    assert state_target(optimizer, params, "a", "exp_avg", (3, 6), torch.float32) is live


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_go_on_where_they_were():
    draws()
    saved = decode_state(encode_state(capture_rng()))
    want = draws()
    draws()
    assert apply_rng(saved) == []
    assert draws() == want


def test_derived_generators_differ_by_rank_and_world_and_repeat():
    saved = capture_rng()
    seen = {}
    for rank, world in ((0, 2), (1, 2), (1, 3)):
        derive_rng(saved, rank, world)
        seen[rank, world] = draws()
    derive_rng(saved, 1, 2)
    assert draws() == seen[1, 2]
    values = [value for triple in seen.values() for value in triple]
    assert len(set(values)) == len(values)
