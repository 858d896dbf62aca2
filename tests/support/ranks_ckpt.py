"""What the ranks of the distributed checkpoint tests do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ckpt import CheckpointManager, CkptError, Retention, TrainState
from ckpt.storage import faultpoints
from support.tiny_run import Run, whole


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def uninterrupted(rank: int, world: int, steps: int) -> list[float]:
    return Run(rank, world).train(steps)


def train_save_die(rank: int, world: int, root: str, out: str, steps: int) -> None:
    """Train, commit, train one more step that is lost, and die without closing anything."""
    run = Run(rank, world)
    manager = CheckpointManager(root, vote_timeout=30)
    assert manager.restore(run.state) is None
    losses = run.train(steps)
    manager.save(steps - 1, run.state)
    run.step()
    manager.wait()
    Path(out, f"{rank}.txt").write_text(repr(losses))
    dist.barrier()
    die()


def resume(rank: int, world: int, root: str, steps: int) -> tuple[int | None, list[float]]:
    run = Run(rank, world, seed=99)
    with CheckpointManager(root, vote_timeout=30) as manager:
        start = manager.restore(run.state)
        return start, run.train(steps)


def restore_and_save(
    rank: int, world: int, root: str, train: int, save_as: int
) -> tuple[int | None, dict[str, str], dict[str, str]]:
    """Restore (if there is something), train, save; digests after restore and before the save."""
    run = Run(rank, world, seed=50)
    with CheckpointManager(root, vote_timeout=30, retention=Retention(latest=10)) as manager:
        start = manager.restore(run.state)
        before = run.digest()
        run.train(train)
        manager.save(save_as, run.state).wait(30)
        return start, before, run.digest()


def hybrid(rank: int, world: int, root: str) -> dict[str, str]:
    """HSDP: replicas over one mesh dimension, shards over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    run = Run(rank, world, mesh=mesh)
    for cursor_step in range(2):
        # Replicas must see the same numbers only through the averaged gradient.
        run.step()
        assert run.cursor.position == cursor_step + 1
    with CheckpointManager(root, vote_timeout=30) as manager:
        manager.save(0, run.state).wait(30)
        return run.digest()


def fault_in_second_save(
    rank: int, world: int, root: str, victim: int, fault: str, timeout: float
) -> dict[str, object]:
    """One good save, then one in which ``victim`` passes a fault; what the rank saw of it."""
    run = Run(rank, world)
    manager = CheckpointManager(root, vote_timeout=timeout)
    run.step()
    manager.save(0, run.state)
    manager.wait()
    kept = run.digest()
    run.step()
    dist.barrier()
    if rank == victim:
        os.environ[faultpoints.ENVIRONMENT] = fault
        faultpoints.forget()
    began = time.monotonic()
    handle = manager.save(1, run.state)
    if fault.endswith("hang") and rank == victim:
        assert _call(lambda: manager.wait(3 * timeout)) is not None, "its thread sleeps for ever"
        die()
    error = _error_of(manager)
    took = time.monotonic() - began
    seen = {"error": error, "took": took, "kept": kept}
    seen["future"] = type(handle.committed.exception(timeout)).__name__
    os.environ.pop(faultpoints.ENVIRONMENT, None)
    faultpoints.forget()
    if fault.endswith("raise"):
        # Nobody died: the very next save works, under the same number.
        manager.save(1, run.state).wait(timeout)
        manager.close()
    return seen


def _error_of(manager: CheckpointManager) -> tuple[str, str] | None:
    try:
        manager.wait()
    except CkptError as error:
        return type(error).__name__, str(error)
    return None


def _call(work: object) -> tuple[str, str] | None:
    try:
        work()  # type: ignore[operator]
    except CkptError as error:
        return type(error).__name__, str(error)
    return None


def disagree_in_every_way(
    rank: int, world: int, root: str, ways: list[str]
) -> dict[str, list[tuple[str, str] | None]]:
    return {way: disagree(rank, f"{root}/{way}", way) for way in ways}


def disagree(rank: int, root: str, what: str) -> list[tuple[str, str] | None]:
    """Make rank 1 differ in one way; the errors of the save and of the wait after it."""
    torch.manual_seed(0)
    rows = 4 if what == "shape" and rank == 1 else 3
    model = torch.nn.Linear(2, rows)
    if what == "name" and rank == 1:
        model.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    if what == "dtype" and rank == 1:
        model = model.double()
    state = TrainState(model, extra={"x": rank if what == "extra" else 0})
    manager = CheckpointManager(root, vote_timeout=10)
    step = 1 + rank if what == "first step" else 1
    found = [_call(lambda: manager.save(step, state)), _error_of(manager)]
    if what in {"later step", "later layout", "later layout of rank 0"}:
        dist.barrier()
        step = 2 + rank if what == "later step" else 2
        changed = {"later layout": 1, "later layout of rank 0": 0}.get(what)
        if rank == changed:
            model.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
        found = [_call(lambda: manager.save(step, state)), _error_of(manager)]
    dist.barrier()
    manager.close()
    return found


def publish_both_ways(rank: int, world: int, root: str) -> list[str | None]:
    run = Run(rank, world)
    run.train(2)
    with CheckpointManager(root, vote_timeout=30, run_name="t", publish_dtype="float32") as m:
        # Only rank 0 says what an engine must show; all ranks get the manifest that has it.
        probe = {"token_ids": [1, 2]} if rank == 0 else None
        first = m.save(0, run.state, publish=True, probe=probe)
        second = m.publish(run.state, step=0, probe=probe)
        third = m.publish(run.state)
        versions = [h.published.result(30) for h in (first, second, third)]
        m.wait()
    assert [v is not None and v.probe for v in versions] == [{"token_ids": [1, 2]}] * 2 + [None]
    return [None if v is None else f"{v.name} {v.adapter_sha256}" for v in versions]


def publish_nan(rank: int, world: int, root: str) -> tuple[object, tuple[str, str] | None, object]:
    run = Run(rank, world)
    run.step()
    with torch.no_grad():
        run.model.a.mul_(float("nan"))
    manager = CheckpointManager(root, vote_timeout=20)
    handle = manager.save(0, run.state, publish=True)
    error = _error_of(manager)
    handle2 = manager.save(1, run.state)
    manager.close()
    return handle.committed.result(0), error, handle2.committed.result(0)


def damaged(rank: int, world: int, root: str) -> tuple[int | None, list[str], dict[str, str]]:
    run = Run(rank, world, seed=3)
    with CheckpointManager(root, vote_timeout=20) as manager:
        start = manager.restore(run.state)
        report = manager.last_restore
        assert report is not None
        return start, [entry.reason for entry in report.damaged], run.digest()


def three_saves(rank: int, world: int, root: str) -> list[dict[str, str]]:
    run = Run(rank, world)
    digests = []
    with CheckpointManager(root, vote_timeout=20, retention=Retention(latest=9)) as manager:
        for step in range(3):
            run.step()
            manager.save(step, run.state)
            digests.append(run.digest())
    return digests


def misfit(rank: int, world: int, root: str) -> tuple[tuple[str, str] | None, bool]:
    """Restore into a model of another shape on rank 1 only; was anything touched?"""
    run = Run(rank, world)
    if rank == 1:
        run.state.extra["mine"] = 1
        run.model.register_parameter("more", torch.nn.Parameter(torch.zeros(3)))
    before = run.digest() if world == 1 else {}
    local = run.model.a.to_local().clone()
    with CheckpointManager(root, vote_timeout=20) as manager:
        error = _call(lambda: manager.restore(run.state))
    same = bool(torch.equal(local, run.model.a.to_local()))
    return error, same and (not before or before == run.digest())


def train_beside_saves(rank: int, world: int, root: str) -> int:
    """Training collectives run while saves are under way; nothing may deadlock."""
    run = Run(rank, world)
    with CheckpointManager(root, vote_timeout=30) as manager:
        for step in range(8):
            run.step()
            manager.save(step, run.state)
        manager.wait()
        dist.barrier()  # rank 0 deletes after the commit that ends the other's wait
        return len(manager.steps())


def save_after_a_forward(rank: int, world: int, root: str) -> dict[str, object]:
    """Save, train and restore with plain ``fully_shard`` after forwards without a backward.

    Mixed precision, so that the root's gathered parameters are bf16 copies of the fp32 shards.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    fully_shard(
        model,
        mesh=init_device_mesh("cpu", (world,)),
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    want = {name: whole(tensor) for name, tensor in state.live().tensors.items()}

    def look() -> None:
        with torch.no_grad():
            model(torch.ones(2, 6))

    look()
    with CheckpointManager(root, vote_timeout=20) as manager:
        first = manager.save(0, state)
        first.wait(20)
        look()
        second = manager.save(1, state)
        second.wait(20)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        look()
        manager.restore(state)
        found = {name: whole(tensor) for name, tensor in state.live().tensors.items()}
        look()  # the forward must use what was restored
        again = {name: whole(tensor) for name, tensor in state.live().tensors.items()}
    same = all(torch.equal(want[k], found[k]) and torch.equal(want[k], again[k]) for k in want)
    return {"same": same, "names": sorted(found), "replanned": second.metrics.planned}
