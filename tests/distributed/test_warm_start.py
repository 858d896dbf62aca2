"""Warm starts of sharded adapters: each rank its own rows, and all of them or none."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from support import ranks_warm
from support.spawn import run_ranks
from support.tiny_run import EXPORT, Run

from ckpt import CheckpointManager

pytestmark = pytest.mark.dist
A, B = (f"base_model.model.lin.lora_{side}.weight" for side in "AB")


def write(directory, a, b, **config):
    directory.mkdir()
    save_file({A: a.contiguous(), B: b.contiguous()}, directory / "adapter_model.safetensors")
    config = {**EXPORT.peft_config, **config}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def padded(rank):
    a, b = torch.zeros(rank, 6), torch.zeros(5, rank)
    a[:3], b[:, :3] = torch.arange(18.0).view(3, 6), torch.arange(15.0).view(5, 3)
    return a, b


def test_rows_and_columns_from_a_directory_and_a_version(tmp_path):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path / "run", publish_dtype="float32") as manager:
        name = manager.publish(run.state).published.result(20).name
    write(tmp_path / "padded", *padded(7), r=7, lora_alpha=7)
    urls = {"version": f"{tmp_path}/run/adapters/{name}", "padded": str(tmp_path / "padded")}
    a, b = padded(3)
    want = {
        "version": [run.model.a.flatten().tolist(), run.model.b.flatten().tolist()],
        "padded": [a.flatten().tolist(), (b / 2).flatten().tolist()],
    }
    for answers in run_ranks(2, ranks_warm.warm, urls):
        assert len(answers) == 4
        for way, found in answers.items():
            assert found == want[way.split()[0]], way


def test_one_rank_that_refuses_stops_all(tmp_path):
    write(tmp_path / "good", *padded(3))
    a, b = padded(4)
    a[3, 5] = 1e-30
    write(tmp_path / "surplus", a, b, r=4, lora_alpha=4)
    a, b = padded(3)
    b[4, 0] = float("nan")  # in the last row, which rank 1 holds
    write(tmp_path / "nan in one shard", a, b)
    want = {
        "model": ("StateError", "no export rule covers head"),
        "url": ("PlanError", "ranks disagree about what to restore: url is"),
        "surplus": ("StateError", "not zero padding"),
        "nan in one shard": ("NonFiniteError", f"{B} holds NaN"),
    }
    for answers in run_ranks(2, ranks_warm.refuse, str(tmp_path), str(tmp_path / "root")):
        for way, (kind, message) in want.items():
            assert answers[way][0] == kind, way
            assert message in answers[way][1], way


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_dies_while_it_reads_leaves_the_other_as_it_was(tmp_path, victim):
    write(tmp_path / "good", *padded(3))
    args = (str(tmp_path / "root"), str(tmp_path / "good"), victim)
    answers = run_ranks(2, ranks_warm.die_while_staging, *args, killed=(victim,))
    kind, message = answers[1 - victim]
    if victim == 1:
        assert kind == "VoteTimeout"
        assert "rank 1 did not answer within 4 s" in message
    else:
        assert kind == "SaveAborted"
        assert "rank 0 and its store are gone" in message


@pytest.mark.s3
def test_each_rank_reads_its_own_rows_of_an_object(tmp_path, s3):
    rows, columns = 512 * 1024, 1024  # 6 MiB of B, 12 KiB of A
    a, b = torch.ones(3, columns), torch.full((rows, 3), 3.0)
    write(tmp_path / "x", a, b)
    url = s3.url()
    import fsspec

    fs = fsspec.filesystem("s3", endpoint_url=s3.endpoint_url)
    for path in (tmp_path / "x").iterdir():
        fs.put_file(str(path), f"{url.removeprefix('s3://')}/{path.name}")
    total = (tmp_path / "x" / "adapter_model.safetensors").stat().st_size
    for received in run_ranks(2, ranks_warm.received, url, rows, columns):
        assert total / 2 <= received <= total / 2 + 200 * 1024
