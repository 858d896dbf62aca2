"""What the blocks of each document find: roots, engines, sources, and names that readers have."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from archon_lora import LoRAConfig, apply_lora
from ckpt import CheckpointManager, TrainState
from ckpt.envelope import canonical_json
from ckpt.layout import new_attempt
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from support import scene_commands, scene_loops, shown_root
from support.pages import ROOT, Scene, Stage
from support.roots import LAYERS, bucket, engine, on_s3, publish, root_at
from support.tiny_run import Run

TOKEN = "a-token-of-the-tests-0123456789"


# -- getting started ---------------------------------------------------------------------------


def readme(stage: Stage) -> None:
    root_at(bucket(stage) / "run7")
    engine(stage, "127.0.0.1:8000")
    stage.statuses["ckpt lint runs/first/adapters/run-v00000001    # what PEFT, vLLM and SGLang "
                   "would make of it"] = 1  # fmt: skip


def readme_end(stage: Stage) -> None:
    ready = next(said for command, said in stage.said.items() if "readyz" in command)
    assert json.loads(ready)["version"] == "run7-v00000002"
    assert "sglang: refused" in next(s for c, s in stage.said.items() if "ckpt lint" in c)
    listed = [s for c, s in stage.said.items() if c.startswith("ckpt versions")]
    assert ["run-v00000002" in text for text in listed] == [True, True]  # by path, and over HTTP


def tutorial_engine(stage: Stage) -> None:
    engine(stage, "127.0.0.1:8000", model=stage.folder / "tiny-qwen2")


def kinds(address: str, kind: str) -> Callable[[Stage], None]:
    """The tutorial's root, and an engine."""

    def begin(stage: Stage) -> None:
        bucket(stage)
        root_at(stage.folder / "runs/kinds", run="kinds", versions=3)
        engine(stage, address, kind)

    return begin


def serves_newest(name: str) -> Callable[[Stage], None]:
    """What the sidecar says is live is the newest version."""

    def end(stage: Stage) -> None:
        ready = next(said for command, said in stage.said.items() if "readyz" in command)
        assert json.loads(ready)["version"] == name

    return end


# -- checkpoints -------------------------------------------------------------------------------


def reports(stage: Stage) -> None:
    stage.names["rank"] = 0


def reports_end(stage: Stage) -> None:
    with (
        contextlib.redirect_stdout(io.StringIO()) as said,
        stage.names["manager"] as manager,
    ):
        manager.save(3, TrainState(nn.Linear(2, 2)))
    assert said.getvalue().startswith("3 ")
    assert any((stage.folder / "runs/7/board").iterdir())


def layouts_mesh(stage: Stage) -> None:
    assert stage.names["config"].parallel.tp == 2
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(stage.folder / "store"), 1), rank=0, world_size=1
    )
    stage.running.callback(dist.destroy_process_group)
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    model = nn.Sequential()
    model.add_module("up", nn.Linear(8, 16))
    model.add_module("down", nn.Linear(16, 8))
    apply_lora(model, LoRAConfig(rank=2, alpha=4, target_modules=["up", "down"]))
    stage.names |= {"mesh": mesh, "model": model}


def layouts_end(stage: Stage) -> None:
    stage.names["model"](torch.ones(3, 8)).sum().backward()
    assert stage.names["model"].up.lora_b.weight.grad is not None


def restores(stage: Stage) -> None:
    root = bucket(stage) / "restores"
    run = Run()
    with CheckpointManager(root) as manager:
        for step in (300, 400, 500):
            run.train(1)
            manager.save(step, run.state)
            manager.wait()
    again = Run(seed=8)
    stage.names |= {
        "state": again.state,
        "manager": stage.running.enter_context(CheckpointManager(root)),
        "again": again,
        "run": run,
    }


def warm_starts(stage: Stage) -> None:
    assert stage.names["start"] == 500
    assert torch.equal(stage.names["again"].model.b, stage.names["run"].model.b)
    tensors, modules = shown_root.adapter(1, 0.1)
    model = nn.ParameterDict({n.replace(".", "_"): nn.Parameter(t) for n, t in tensors.items()})
    export = shown_root.export_of(modules)
    rules = [dataclasses.replace(r, source=r.source.replace(".", "_")) for r in export.rules]
    state = TrainState(model, export=dataclasses.replace(export, rules=tuple(rules)))
    root = Path(stage.places["s3://bucket"]) / "run-6"
    root_at(root, run="run6", versions=0, above=119)
    with contextlib.closing(open_storage(root)) as storage:
        publish_version(
            storage,
            run="run6",
            export=export,
            source=MemorySource(tensors),
            step=None,
            policy_version=0,
            epoch=1,
            attempt=new_attempt(),
            base=None,
        )
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    fresh = stage.running.enter_context(CheckpointManager(stage.folder / "runs/7"))
    stage.names |= {"state": state, "manager": fresh, "wanted": tensors}


def warm_starts_end(stage: Stage) -> None:
    assert stage.names["taken"].verified
    live = stage.names["state"].live().tensors
    for name, tensor in stage.names["wanted"].items():
        found = live[f"model.{name.replace('.', '_')}"].detach()
        assert torch.equal(found, tensor.bfloat16().float())


def on_s3_unfinished(stage: Stage) -> None:
    with stage.names["manager"] as manager:
        manager.save(1, TrainState(nn.Linear(2, 2)))
    server = stage.fixture("s3")
    with contextlib.closing(server.client()) as client:
        client.create_multipart_upload(Bucket=server.bucket, Key="run7/steps/left")


def on_s3_end(stage: Stage) -> None:
    # Moto says of every upload that it began in 2010.
    found = [upload.path for upload in [*stage.names["gone"], *stage.names["young"]]]
    assert found == ["steps/left"]


def how_to_s3(stage: Stage) -> None:
    on_s3(stage)
    stage.patch.chdir(ROOT)  # where examples/train.toml is
    with CheckpointManager(stage.own("s3://bucket/prefix")) as manager:
        manager.save(7, TrainState(nn.Linear(2, 2)))


def how_to_s3_end(stage: Stage) -> None:
    assert "ok      exclusive create" in next(s for c, s in stage.said.items() if "doctor" in c)
    assert "committed" in next(s for c, s in stage.said.items() if c.startswith("ckpt ls"))
    policies = [json.loads(text) for text in stage.read]
    assert {policy["Version"] for policy in policies} == {"2012-10-17"}  # more: test_documents.py


def tiers(stage: Stage) -> None:
    stage.names |= {"state": Run().state, "step": 3}
    bucket(stage)


def tiers_end(stage: Stage) -> None:
    for url in ("s3://bucket/run-7", "/dev/shm/run-7"):
        assert (Path(stage.own(url)) / "steps/step-00000003.w0001/MANIFEST.json").exists()


# -- serving -----------------------------------------------------------------------------------


def engines(stage: Stage) -> None:
    root_at(bucket(stage) / "run-7")
    engine(stage, "10.0.0.1:8000", "vllm")
    engine(stage, "10.0.0.2:30000", "sglang")
    stage.names["key"] = None


def engines_end(stage: Stage) -> None:
    assert stage.names["report"].explain().startswith("run7-v00000002 is live (2 of 2 replicas")
    assert stage.names["name"] == "run7-v00000002"
    for found in stage.names["engines"]:
        found.close()
    stage.names["registry"].close()


class Served(Exception):
    """Enough was served."""


def versions(stage: Stage) -> None:
    root = root_at(bucket(stage) / "run7", versions=1)
    served: list[str] = []

    def serve(name: str, directory: str | Path) -> None:
        assert Path(directory, "adapter_config.json").exists()
        served.append(name)
        if len(served) == 2:
            raise Served
        publish(root, seed=1)

    stage.enough = Served
    stage.names |= {"serve": serve, "served": served}


def versions_end(stage: Stage) -> None:
    assert stage.names["served"] == ["run7-v00000001", "run7-v00000002"]
    stage.names["registry"].close()


def synced(stage: Stage) -> None:
    root_at(bucket(stage) / "run7")
    engine(stage, "127.0.0.1:8000")


def synced_end(stage: Stage) -> None:
    until_ready(stage, "run7-v00000002")


def until_ready(stage: Stage, version: str) -> None:
    from support.documents import curl

    status, said = curl(["curl", "-s", stage.own("http://127.0.0.1:9101/readyz")], stage, "sh")
    assert (status, json.loads(said)["version"]) == (0, version)


def service(stage: Stage) -> None:
    root_at(bucket(stage) / "run7", above=40, versions=1, steps=(120,))
    root_at(Path(stage.own("/data/runs/run8")), run="run8")
    Path(stage.own("/run/secrets/ckpt-token")).write_text(TOKEN)
    engine(stage, "127.0.0.1:8000")


def service_is_elsewhere(stage: Stage) -> None:
    stage.places["https://ckpt.example.org"] = f"http://{stage.places['127.0.0.1:8080']}"


def service_news(stage: Stage) -> None:
    until_ready(stage, "run7-v00000041")
    ended = threading.Event()
    root = Path(stage.own("s3://bucket/run7"))

    def publish_on() -> None:
        for seed in range(100):
            publish(root, seed=seed)
            if ended.wait(0.5):
                return

    publisher = threading.Thread(target=publish_on)
    stage.running.callback(publisher.join)
    stage.running.callback(ended.set)
    publisher.start()


def service_end(stage: Stage) -> None:
    from ckpt.service.routes_jobs import JobBody

    jobs = [TypeAdapter(JobBody).validate_json(line) for line in stage.read[0].splitlines()]
    assert [job.kind for job in jobs] == ["export", "verify", "verify", "prune"]
    assert stage.names["job"].state == "succeeded"
    assert Path(stage.names["path"], "adapter_config.json").exists()
    assert (stage.folder / "adapter/adapter_config.json").exists()
    stage.names["registry"].close()


def portable(stage: Stage) -> None:
    root_at(bucket(stage) / "run7")
    base = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS,
        "vocab_size": 97,
        "tie_word_embeddings": True,
    }
    (stage.folder / "Qwen2.5-0.5B").mkdir()
    (stage.folder / "Qwen2.5-0.5B/config.json").write_text(json.dumps(base))
    stage.shaped = True


def settings(stage: Stage) -> None:
    """What examples/train.toml says, as the file that the page trains from."""
    (stage.folder / "examples").mkdir()
    text = (ROOT / "examples/train.toml").read_text("utf-8")
    for name in ("examples/train.toml", "run.toml"):
        (stage.folder / name).write_text(text, "utf-8")


def formats_end(stage: Stage) -> None:
    value = {"b": [1, 1.0, 1e-05, None], "a": 'é"\n\x01'}
    assert stage.names["canonical"](value) == canonical_json(value)


SCENES: dict[str, Scene] = {
    **scene_loops.SCENES,
    "README.md": Scene(readme, end=readme_end),
    "docs/tutorial.md": Scene(
        before={
            "ckpt sync runs/kinds --run kinds --engine vllm+http://127.0.0.1:8000 --cache cache "
            "--listen 127.0.0.1:9101": tutorial_engine
        }
    ),
    "docs/howto/s3.md": Scene(how_to_s3, end=how_to_s3_end),
    "docs/howto/sglang.md": Scene(
        kinds("127.0.0.1:30000", "sglang"), end=serves_newest("kinds-v00000003")
    ),
    "docs/howto/vllm.md": Scene(
        kinds("127.0.0.1:8000", "vllm"), end=serves_newest("kinds-v00000003")
    ),
    "docs/cli.md": scene_commands.SCENE,
    "docs/engines.md": Scene(engines, end=engines_end),
    "docs/format.md": Scene(end=formats_end),
    "docs/main-job.md": Scene(settings),
    "docs/metrics.md": Scene(reports, end=reports_end),
    "docs/parallel.md": Scene(
        before={"from torch.distributed.fsdp import fully_shard": layouts_mesh}, end=layouts_end
    ),
    "docs/portable-adapters.md": Scene(portable),
    "docs/restore.md": Scene(
        restores, before={"start = manager.restore(state)": warm_starts}, end=warm_starts_end
    ),
    "docs/rl-engines.md": Scene(settings),
    "docs/s3.md": Scene(
        on_s3, before={"from datetime import timedelta": on_s3_unfinished}, end=on_s3_end
    ),
    "docs/service.md": Scene(
        service,
        before={
            "export CKPT_TOKEN_FILE=/run/secrets/ckpt-token": service_is_elsewhere,
            "from ckpt.client import Client  # AsyncClient has the same methods": service_news,
        },
        end=service_end,
    ),
    "docs/sync.md": Scene(synced, end=synced_end),
    "docs/tiers.md": Scene(tiers, end=tiers_end),
    "docs/versions.md": Scene(versions, end=versions_end),
}
