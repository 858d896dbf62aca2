"""What docs/cli.md shows: roots at the moments of its transcripts."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from torch import nn

from ckpt import CheckpointManager, TrainState
from ckpt.dcp import Writer
from ckpt.holds import take_lease
from ckpt.storage import open_storage
from ckpt.tier import Tier
from support import shown_root, stock
from support.pages import Scene, Stage
from support.roots import bucket, engine, on_s3, publish, root_at
from support.steps import tiny_adapter, write_step, write_writer


def begin(stage: Stage) -> None:
    bucket(stage)
    stage.shaped = True
    stage.statuses = {
        "ckpt ls s3://bucket/run7 --endpoint-url http://127.0.0.1:9": 3,
        "ckpt verify run7 --step 100 --json": 1,
        "ckpt diff run7 run7-v00000001 run7-v00000002": 1,
    }
    run7(stage)


def run7(stage: Stage) -> None:
    """A second writer resumed from step 80; versions of steps 80 and 140."""
    root = fresh(stage, "run7")
    steps(root, {1: (40, 80, 120), 2: (100, 140)}, resumed=80)
    for number, step in enumerate((80, 140)):
        publish(root, seed=number, step=step, epoch=2)


def fresh(stage: Stage, name: str) -> Path:
    """An empty root of that name, also at the bucket's."""
    root, linked = stage.folder / name, Path(stage.places["s3://bucket"]) / name
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    linked.unlink(missing_ok=True)
    linked.symlink_to(root)
    return root


MODULES = tuple(
    f"layers.{layer}.self_attn.{name}_proj" for layer in range(2) for name in ("k", "o", "q", "v")
)


def steps(
    root: Path, epochs: dict[int, tuple[int, ...]], resumed: int, *, ranked: bool = False
) -> None:
    """Steps of two writers, the second of which resumed; ``ranked``: step 140 was the best."""
    tensors, export = tiny_adapter(MODULES, rank=8)
    moments = {name for name in tensors if name.endswith("exp_avg")}
    tensors |= {f"{name}_sq": tensors[name] for name in moments}
    with contextlib.closing(open_storage(root)) as storage:
        write_writer(storage, 1)
        write_writer(storage, 2, parent=(resumed, 1))
        for epoch, numbers in epochs.items():
            for step in numbers:
                write_step(
                    storage,
                    step,
                    tensors,
                    epoch=epoch,
                    export=export,
                    base=shown_root.BASE,
                    policy_version=step,
                    metrics={"reward": 0.61 if step == 140 else 0.3} if ranked else None,
                )


def nobody_there(stage: Stage) -> None:
    del stage.places["s3://bucket"]
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        stage.patch.setenv(f"AWS_{name}", "none")


def somewhere(stage: Stage) -> None:
    bucket(stage)


def to_be_served(stage: Stage) -> None:
    root_at(Path(stage.own("/data/run7")), versions=1)


def damaged(stage: Stage) -> None:
    shard = next((stage.folder / "run7/steps/step-00000100.w0002").glob("shard-*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def of_plain_dcp(stage: Stage) -> None:
    import torch.distributed.checkpoint as dcp

    stage.folder.joinpath("run8").mkdir()
    dcp.save({"model": nn.Linear(2, 2).state_dict()}, storage_writer=Writer("run8"), no_dist=True)


def forty_one(stage: Stage) -> None:
    root = fresh(stage, "run7")
    steps(root, {1: (80, 120)}, resumed=120)
    (root / "adapters/run7-v00000039").mkdir(parents=True)
    for number in (0, 1):
        publish(root, seed=number, epoch=2)
    with contextlib.closing(open_storage(root)) as storage:
        take_lease(storage, "run7-v00000041", "replica-1", 600)


def to_be_pruned(stage: Stage) -> None:
    steps(fresh(stage, "run7"), {1: (100, 120, 140), 2: (140, 160)}, resumed=120, ranked=True)


def unfinished(stage: Stage) -> None:
    on_s3(stage)
    server = stage.fixture("s3")
    with contextlib.closing(server.client()) as client:
        key = "run7/steps/step-00000120.w0001/left/shard-00000-of-00002.safetensors"
        client.create_multipart_upload(Bucket=server.bucket, Key=key)


def a_tier(stage: Stage) -> None:
    """Two steps in a tier that the root does not have; trainer and uploader are gone."""
    bucket(stage)
    root = fresh(stage, "run7")
    place = Path(stage.own("/dev/shm/run7"))
    manager = CheckpointManager(root, local_tier=place)
    for step in (120, 140):
        manager.save(step, TrainState(nn.Linear(2, 2)))
        manager.wait()
    manager.wait_mirrored(60)
    manager.close()
    tier = Tier(place, str(root))
    deadline = time.monotonic() + 60
    while tier.uploader_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    shutil.rmtree(root / "steps")
    for mark in (place / "mirror").glob("*.mirrored"):
        mark.unlink()


def engine_and_root(stage: Stage) -> None:
    root_at(fresh(stage, "run7"), versions=1)
    engine(stage, "127.0.0.1:8000")


def stock_dcp(stage: Stage) -> None:
    shutil.rmtree(stage.folder / "run8")
    model, optimizer = stock.model_and_optimizer()
    stock.save(stock.state_dict(model, optimizer), stage.folder / "stock")


def once_more(stage: Stage) -> None:
    run7(stage)
    shutil.rmtree(stage.folder / "exported")


def two_versions(stage: Stage) -> None:
    bucket(stage)
    run7(stage)


def end(stage: Stage) -> None:
    assert stage.names["newest"].name == "run7-v00000002"


SCENE = Scene(
    begin,
    before={
        "$ ckpt ls s3://bucket/run7 --endpoint-url http://127.0.0.1:9": nobody_there,
        "$ ckpt ls run7": somewhere,
        "$ ckpt verify run7 --step 100 --json": damaged,
        "$ ckpt export run8 for-dcp --format dcp": of_plain_dcp,
        "$ ckpt publish run7 --step 120": forty_one,
        '$ ckpt pin run7 --step 100 --note "figure 3"': to_be_pruned,
        "$ ckpt prune s3://bucket/run7 --uploads --dry-run": unfinished,
        "$ ckpt mirror s3://bucket/run7 /dev/shm/run7": a_tier,
        "$ ckpt sync s3://bucket/run7 --run run7 --engine vllm+http://127.0.0.1:8000 "
        "--cache /var/cache/adapters": engine_and_root,
        "$ ckpt serve --root /data/run7 --listen 127.0.0.1:0 --json 2>/dev/null": to_be_served,
        "$ ckpt import stock run8 --step 1000": stock_dcp,
        "from ckpt.consolidate import consolidate": once_more,
        "$ ckpt doctor s3://bucket/run7": on_s3,
        "$ ckpt diff run7 run7-v00000001 run7-v00000002": two_versions,
    },
    end=end,
)
