"""One version on a real vLLM and a real SGLang at once, and what a stuck replica does to it.

Skipped unless the environment says how to start both (``docs/engines.md``).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.real_engines import MODEL, PROMPT, Server, Trainer

from ckpt.handoff.drivers import open_engine
from ckpt.handoff.handover import Handover
from ckpt.handoff.probe import DEFAULT_TOLERANCE, distance
from ckpt.handoff.registry import Registry
from ckpt.layout import new_attempt

pytestmark = [pytest.mark.compat, pytest.mark.slow, pytest.mark.timeout(1200)]

KINDS = ("vllm", "sglang")


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    commands = [os.environ.get(f"CKPT_TEST_{kind.upper()}_START") for kind in KINDS]
    if MODEL not in os.environ or None in commands:
        pytest.skip(f"set {MODEL}, CKPT_TEST_VLLM_START and CKPT_TEST_SGLANG_START")
    with contextlib.ExitStack() as stack:
        found = []
        for kind, command in zip(KINDS, commands, strict=True):
            found.append(Server(kind, None, command))
            stack.callback(found[-1].log.close)
            stack.callback(found[-1].kill)
            found[-1].start()
        for server in found:
            server.ready()
        yield found


def test_a_stuck_replica_leaves_the_old_version_on_both(servers: list[Server], tmp_path: Path):
    trainer = Trainer(os.environ[MODEL])
    root, run = str(tmp_path / "root"), f"run-{new_attempt()[:10]}"
    registry = Registry(root)
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(
                contextlib.closing(open_engine(f"{one.kind}+{one.url}", timeout_s=20.0))
            )
            for one in servers
        ]
        handover = Handover(engines, holder="compat-tests", registry=registry, retries=0)
        trainer.draw(1)
        old = trainer.publish(root, run)
        handover.make_live(old, registry.fetch(old, tmp_path / "cache")).raise_if_failed()
        answers = [engine.logprobs(PROMPT, old.name) for engine in engines]
        print("vLLM and SGLang are", round(distance(*answers), 4), "nats apart")
        assert distance(*answers) < DEFAULT_TOLERANCE

        trainer.draw(2)
        new = trainer.publish(root, run)
        path = registry.fetch(new, tmp_path / "cache")
        servers[1].signal(signal.SIGSTOP)
        report = handover.make_live(new, path)
        assert not report.live
        assert [item.state for item in report.replicas] == ["proven", "failed"]
        assert "no answer within 20 s" in report.explain()
        assert handover.current == old
        assert distance(engines[0].logprobs(PROMPT, old.name), answers[0]) < DEFAULT_TOLERANCE

        servers[1].kill()
        servers[1].start()
        servers[1].ready()
        restored = handover.restore_missing()
        assert restored is not None
        assert [item.url for item in restored.replicas] == [servers[1].url]
        restored.raise_if_failed()
        handover.make_live(new, path).raise_if_failed()
        handover.unload_unused()
        assert [list(engine.adapters()) for engine in engines] == [[new.name]] * 2
