"""What the ranks of the tier tests do, in processes of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ckpt import CheckpointManager, CkptError, Retention, upload
from ckpt.session import read_beat
from ckpt.storage import s3
from ckpt.tier import Tier
from support.tiny_run import Run

SECONDS = 60.0


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.02)


def flip(path: Path, position: int = -1) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def save_and_die(
    rank: int, world: int, remote: str, tier: str, steps: int, wait_for_file: str | None
) -> None:
    """Save a few steps and die at once, or when a file lies at a POSIX root."""
    run = Run(rank, world)
    manager = CheckpointManager(remote, local_tier=tier, retention=Retention(latest=9))
    manager.restore(run.state)
    for step in range(steps):
        run.step()
        manager.save(step, run.state)
    manager.wait()
    if wait_for_file is not None:
        wait_for(lambda: list(Path(remote).glob(wait_for_file)))
    os.kill(os.getpid(), signal.SIGKILL)


def private_tiers(rank: int, world: int, remote: str, home: str) -> dict[str, object]:
    """Two nodes with tiers of their own: save, restore, damage, lose one."""
    mine = f"{home}/tier-{rank}"
    seen: dict[str, object] = {}

    def manager() -> CheckpointManager:
        return CheckpointManager(
            remote, local_tier=mine, vote_timeout=30, run_name="t", retention=Retention(latest=9)
        )

    def restored(key: str) -> None:
        run = Run(rank, world, seed=50)
        with manager() as m:
            step = m.restore(run.state)
            report = m.last_restore
            reasons = [entry.reason for entry in report.damaged]
            seen[key] = (step, report.local, run.digest(), reasons)

    with contextlib.suppress(CkptError):
        tier = None if rank else mine
        CheckpointManager(remote, local_tier=tier, vote_timeout=10).close()
        seen["tier on some ranks"] = "accepted"
    run = Run(rank, world)
    with manager() as m:
        m.restore(run.state)
        for step in range(2):
            run.step()
            handle = m.save(step, run.state, publish=step == 1)
            seen[f"digest {step}"] = run.digest()
        alone = m.publish(run.state)
        m.wait_mirrored(SECONDS)
        seen["versions"] = [h.published.result(0).adapter_sha256 for h in (handle, alone)]
    restored("both")
    dist.barrier()
    # No uploader can start while this lock is held: step 2 stays where it is.
    tier = Tier(mine, str(Path(remote).resolve()))
    wait_for(lambda: not tier.uploader_alive())
    lock = tier.hold_uploader()
    with manager() as m:
        m.restore(run.state)
        run.step()
        m.save(2, run.state)
        seen["digest 2"] = run.digest()
        m.wait()
    restored("unmirrored")
    dist.barrier()
    if rank == 1:
        flip(next(Path(mine).glob("steps/step-00000002.*/shard-00001-of-00002.safetensors")))
    dist.barrier()
    restored("damaged part")
    dist.barrier()
    if rank == 1:
        shutil.rmtree(mine)
    dist.barrier()
    restored("lost tier")
    lock.release()
    return seen


def uploader_pid(tier: str) -> int:
    """Process id in the tier's heartbeat, once there is one."""
    wait_for(lambda: read_beat(Path(tier)))
    beat = read_beat(Path(tier))
    assert beat is not None
    return beat.pid


def upload_in_small_parts(tier: str) -> None:
    """Be a tier's uploader, for which every file is large enough for an upload in parts."""
    s3.SINGLE_PUT_BYTES = 16
    sys.exit(upload.main([tier]))
