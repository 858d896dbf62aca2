"""Partial restores: what is named is restored, and nothing else is looked at or changed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from support.tiny_run import Run, Tiny

from ckpt import (
    ALL_PARTS,
    CheckpointManager,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    Part,
    StateError,
    TrainState,
)
from ckpt.state import encode_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A root with one step of a run, and that run as it was."""
    root = tmp_path_factory.mktemp("parts")
    run = Run()
    run.train(3)
    run.state.per_rank["note"].position = 41
    with CheckpointManager(root) as manager:
        manager.save(5, run.state).wait(20)
    return root, pictures(run)


def pictures(run):
    """Each part of a run's state as it is now, in a form that can be compared."""
    live = run.state.live()
    shared, mine = run.state.shared_values(live), run.state.rank_values()
    tensors = run.digest()
    return {
        "model": {k: v for k, v in tensors.items() if k.startswith("model.")},
        "optimizer": (
            {k: v for k, v in tensors.items() if k.startswith("optim.")},
            encode_state(shared["optimizer"]),
        ),
        "scheduler": encode_state(shared["scheduler"]),
        "extra": encode_state(shared["extra"]),
        "rng": encode_state(mine["rng"]),
        "dataloader": encode_state(mine["dataloader"]),
        "per_rank": encode_state(mine["per_rank"]),
    }


def other_run():
    """A run that differs from the saved one in every part."""
    run = Run(seed=1234)
    run.train(1)
    with torch.no_grad():
        run.model.a.add_(1.0)
    return run


@pytest.mark.parametrize("names", [{part} for part in sorted(ALL_PARTS)], ids=lambda n: min(n))
def test_one_part_alone(saved, names):
    root, want = saved
    run = other_run()
    before = pictures(run)
    assert all(before[part] != want[part] for part in ALL_PARTS), "every part can be told apart"
    with CheckpointManager(root) as manager:
        assert manager.restore(run.state, parts=names) == 5
        assert manager.last_restore.parts == names
    after = pictures(run)
    if names == {"scheduler"}:  # the one entry that the schedule writes into the optimizer
        assert run.optimizer.param_groups[0]["lr"] == run.scheduler.get_last_lr()[0] == 0.05
        before.pop("optimizer")
    for part, value in before.items():
        assert after[part] == (want[part] if part in names else value), part


def test_everything_but_the_optimizer_goes_on_at_the_schedules_rate(saved):
    root, want = saved
    run = Run(seed=99)
    with CheckpointManager(root) as manager:
        manager.restore(run.state, parts=ALL_PARTS - {"optimizer"})
        (note,) = manager.last_restore.notes
    assert "learning rate (0.05, 0.025)" in note
    assert not run.optimizer.state
    after = pictures(run)
    for part in ALL_PARTS - {"optimizer"}:
        assert after[part] == want[part], part
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.05, 0.025]
    run.step()


def test_a_part_that_is_left_out_is_not_compared(saved):
    root, want = saved
    run = Run()
    bare = TrainState(run.model, extra={})
    sgd = TrainState(run.model, torch.optim.SGD([run.model.a], lr=0.1))
    with CheckpointManager(root) as manager:
        with pytest.raises(StateError, match="only the checkpoint has optimizer"):
            manager.restore(bare)
        with pytest.raises(StateError, match="saved with AdamW, the live optimizer is SGD; build"):
            manager.restore(sgd, strict=False)
        assert manager.restore(bare, parts={Part.MODEL, "extra"}) == 5
        assert manager.restore(sgd, parts={"model"}) == 5
    assert {k: v for k, v in run.digest().items() if k in want["model"]} == want["model"]
    assert bare.extra == {"policy_version": 3}
    other = Run()
    other.model.more = torch.nn.Parameter(torch.zeros(1))
    with CheckpointManager(root) as manager:
        with pytest.raises(StateError, match=r"lacks model\.more"):
            manager.restore(other.state, parts={"model"})
        assert manager.restore(other.state, parts={"rng", "extra"}) == 5


def test_damage_in_a_part_that_is_not_wanted_does_not_matter(tmp_path):
    """A block of its own for the adapter, so that only the optimizer's bytes are damaged."""
    model = torch.nn.Linear(1024, 2048, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    want = model.weight.detach().clone()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, TrainState(model, optimizer)).wait(20)
    (shard,) = tmp_path.glob("steps/*/shard-*")
    with safe_open(str(shard), framework="pt") as file:
        assert "optim.weight.exp_avg" in file.keys()  # noqa: SIM118
    with shard.open("r+b") as file:
        file.seek(20 * 1024 * 1024)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    fresh = torch.nn.Linear(1024, 2048, bias=False)
    state = TrainState(fresh, torch.optim.AdamW(fresh.parameters()))
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(FileNotFoundError, match="none of the 1 step"):
            manager.restore(state)
        before = manager._storage.traffic
        assert manager.restore(state, parts={"model"}) == 0
        received = (manager._storage.traffic - before).received
    assert torch.equal(fresh.weight, want)
    assert received < 17 * 1024 * 1024, "the optimizer's blocks are not read"


def test_saving_goes_on_after_a_partial_restore(tmp_path):
    run = Run()
    run.train(2)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state)
        manager.save(1, run.state)
    again = Run(seed=3)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(again.state, step=0, parts={"model"}) == 0
        again.step()
        manager.save(1, again.state).wait(20)
        digest = again.digest()
    last = Run(seed=4)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(last.state) == 1
        assert manager.last_restore.epoch == 2
    assert last.digest() == digest


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((), "parts is empty"),
        ("model", "must be a set of names"),
        ({"modle"}, r"no part of a checkpoint is called 'modle'; the parts are model, optimizer"),
        ({"model", 3}, "no part of a checkpoint is called 3"),
        (7, "must be a set of names"),
    ],
)
def test_names_are_checked(tmp_path, parts, message):
    with CheckpointManager(tmp_path) as manager, pytest.raises(ConfigError, match=message):
        manager.restore(TrainState(Tiny()), parts=parts)


def test_generators_left_out_do_not_move(saved):
    root, _ = saved
    run = other_run()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    with CheckpointManager(root) as manager:
        manager.restore(run.state, parts=ALL_PARTS - {"rng"})
    found = (torch.rand(()).item(), random.random(), np.random.rand())
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert found == (torch.rand(()).item(), random.random(), np.random.rand())


def test_without_strict_what_only_the_live_side_has_keeps_its_moments(saved):
    root, want = saved
    run = Run()
    run.model.more = torch.nn.Parameter(torch.zeros(2))
    run.optimizer.add_param_group({"params": [run.model.more], "lr": 0.3})
    run.model.more.grad = torch.ones(2)
    run.optimizer.step()
    moments = run.optimizer.state[run.model.more]["exp_avg"].clone()
    with CheckpointManager(root) as manager:
        with pytest.raises(StateError, match=r"lacks model\.more, optim\.more"):
            manager.restore(run.state, parts={"model", "optimizer"})
        manager.restore(run.state, parts={"model", "optimizer"}, strict=False)
        assert manager.last_restore.missing == ("model.more", "optim.more")
    assert torch.equal(run.optimizer.state[run.model.more]["exp_avg"], moments)
    assert run.optimizer.param_groups[2]["lr"] == 0.3
    found = {k: v for k, v in run.digest().items() if ".more" not in k}
    assert found == {**want["model"], **want["optimizer"][0]}


@pytest.mark.parametrize("strict", [True, False])
def test_a_step_by_number_is_that_step_or_an_error(tmp_path, strict):
    run = Run()
    with CheckpointManager(tmp_path) as manager:
        for step in (3, 5, 7):
            run.step()
            manager.save(step, run.state)
    (shard,) = tmp_path.glob("steps/step-00000005.*/shard-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = run.digest()
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(DamagedError, match="step 5 "):
            manager.restore(run.state, step=5, strict=strict)
        with pytest.raises(NoCheckpoint, match=r"no step 4 in .*; newest steps: 7, 5, 3"):
            manager.restore(run.state, step=4, strict=strict)
        for wrong in (-1, "5", 5.0, True):
            with pytest.raises(ConfigError, match="step"):
                manager.restore(run.state, step=wrong, strict=strict)
        assert run.digest() == before
        assert manager.restore(run.state, step=3, strict=strict) == 3
        assert manager.restore(run.state, strict=strict) == 7
