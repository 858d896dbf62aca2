"""The training loop with a real vLLM and a real SGLang as samplers, restarted on the way.

Skipped unless the environment says how to start them (``docs/engines.md``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from support.real_engines import MODEL, Server

from archon_lora.rl import loop
from archon_lora.rl.config import load_config
from archon_lora.rl.metrics import read_metrics

pytestmark = [pytest.mark.compat, pytest.mark.slow, pytest.mark.timeout(1200)]

# vLLM reports log-probabilities at temperature 1 unless it is told otherwise.
TEMPERATURE = {"vllm": 1.0, "sglang": 0.8}


@pytest.fixture(params=TEMPERATURE)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind = request.param
    command = os.environ.get(f"CKPT_TEST_{kind.upper()}_START")
    if MODEL not in os.environ or command is None:
        pytest.skip(f"set {MODEL} and CKPT_TEST_{kind.upper()}_START")
    found = Server(kind, None, command)
    with contextlib.ExitStack() as stack:
        stack.callback(found.log.close)
        stack.callback(found.kill)
        found.start()
        found.ready()
        yield found


def test_samples_are_of_the_version_that_was_asked_across_a_restart(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "c.toml").write_text(f"""
        [run]
        steps = 6
        metrics = "{tmp_path}/metrics.jsonl"
        [model]
        path = "{os.environ[MODEL]}"
        [rollout]
        source = "{server.kind}"
        prompts_per_step = 2
        group_size = 4
        max_new_tokens = 8
        temperature = {TEMPERATURE[server.kind]}
        [engine]
        urls = ["{server.url}"]
        ready_timeout_s = 300
        batch_timeout_s = 900
        [checkpoint]
        root = "{tmp_path}/root"
    """)
    honest = loop.train_on

    def restarting(engine, batch, config, *, group):
        if batch.step == 2:
            server.kill()
            server.start()
            server.ready()
        return honest(engine, batch, config, group=group)

    monkeypatch.setattr(loop, "train_on", restarting)
    try:
        loop.run_training(load_config(tmp_path / "c.toml"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["staleness"] for r in records.values()] == [0, 1, 1, 1, 1, 1]
    assert len({name for r in records.values() for name in r["made_by"]}) == 5
    for step, r in records.items():
        print(server.kind, step, r["generate_ms"], r["handover_ms"], r["rounds"], r["refused"])
