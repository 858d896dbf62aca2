"""The demonstration, phase by phase.

Two roots are trained on: ``reference``, which nothing disturbs, and ``job``, whose rank 1 is
killed, which is resumed on the same number of ranks and then on one. What the second must share
with the first is compared bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.demo import findings
from archon_lora.rl.demo.processes import Child, ChildFailed, run_child, torchrun
from archon_lora.rl.demo.report import Report, draw
from archon_lora.rl.demo.s3 import BUCKET, client_environment, embedded_s3
from archon_lora.rl.metrics import read_events, read_metrics, read_records

_CONFIG = """\
[run]
name = "{name}"
metrics = "{metrics}"
steps = {steps}

[model]
path = "{model}"
name = "tiny-qwen2"

[lora]
rank = 8
alpha = 16.0

[optimizer]
lr = 0.02

[task]
kinds = ["digits", "lower"]

[rollout]
max_staleness = 1

[checkpoint]
root = "{root}"
publish_every = {publish_every}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSettings:
    """How long the demonstration is, and where it saves.

    Attributes:
        store: ``s3`` starts an S3 server on loopback; ``local`` saves to directories.
        world: ranks of the reference, the killed and the resumed run.
        steps: steps of the killed and resumed run.
        more_steps: further steps on one rank.
        kill_after: the kill comes once this step has been logged.
        publish_every: cadence of published versions.
        margin: by how much the last quarter's mean reward must exceed the first's.
        deadline_s: longest run of any child.
    """

    store: Literal["s3", "local"] = "s3"
    world: int = 2
    steps: int = 36
    more_steps: int = 4
    kill_after: int = 17
    publish_every: int = 10
    margin: float = 0.15
    deadline_s: float = 120.0


def run_demo(out: Path, settings: DemoSettings, *, console: Console) -> Report:
    """Run every phase and write ``results.json`` and ``reward.png`` below ``out``.

    A phase that breaks is a failed check with the end of its log; the phases after it are left
    out, and the report says so.
    """
    demo = Demo(out, settings, console)
    with ExitStack() as stack:
        try:
            demo.run(stack)
        except ChildFailed as err:
            console.print(str(err), markup=False, highlight=False, soft_wrap=True)
            reason = str(err).splitlines()[0]
            demo.report.check(f"{demo.phase_name}, and all that follows", reason, passed=False)
    demo.report.write(out / "results.json")
    demo.report.show(console)
    return demo.report


class Demo:
    """State shared by the phases."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out.resolve()
        self.settings = settings
        self.console = console
        self.report = Report()
        self.env = _child_environment()
        # A new name each time: neither results nor roots of an earlier demonstration mix in.
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        self.work = self.out / "runs" / f"{self.stamp}-{os.getpid()}"
        self.model = self.out / "model"
        self.configs: dict[str, Path] = {}
        self.roots: dict[str, str] = {}
        self.killed_at = 0
        self.phase_name = "set-up"

    @contextmanager
    def phase(self, name: str, text: str) -> Iterator[None]:
        """Time a phase and say that it began."""
        self.phase_name = name
        self.console.print(f"[bold]{name}[/]  {text}", highlight=False)
        began = time.perf_counter()
        yield
        self.report.seconds[name] = round(time.perf_counter() - began, 2)

    def run(self, stack: ExitStack) -> None:
        """All phases, in order."""
        s = self.settings
        with self.phase("set-up", f"a tiny Qwen2 model and the {s.store} store"):
            write_tiny_qwen2(self.model, std=0.1)
            self._open_store(stack)
        with self.phase("reference", f"{s.steps + s.more_steps} steps on {s.world} ranks"):
            self._train("reference", s.world, s.steps + s.more_steps)
        with self.phase("kill", f"the same run; SIGKILL of rank 1 after step {s.kill_after}"):
            self._train_and_kill()
        with self.phase("resume", f"on {s.world} ranks up to step {s.steps - 1}"):
            self._train("job", s.world, s.steps)
        with self.phase("export", "ckpt export, then PEFT and transformers; state on 1 rank"):
            self._export_and_compare()
        with self.phase("one rank", f"{s.more_steps} more steps on 1 rank"):
            self._train("job", 1, s.steps + s.more_steps)
        with self.phase("verify", "ckpt verify and ckpt ls"):
            self._verify()
        with self.phase("findings", "comparing the runs"):
            self._compare_runs()

    # -- phases --------------------------------------------------------------------------------

    def _open_store(self, stack: ExitStack) -> None:
        base = str(self.work)
        if self.settings.store == "s3":
            endpoint = stack.enter_context(embedded_s3(self.work / "s3.log", self.env))
            self.env |= client_environment(endpoint)
            base = f"s3://{BUCKET}/{self.work.name}"
        for name in ("reference", "job"):
            self.roots[name] = f"{base}/{name}"
            config = self.work / f"{name}.toml"
            config.parent.mkdir(parents=True, exist_ok=True)
            config.write_text(
                _CONFIG.format(
                    name=name,
                    metrics=self._metrics(name),
                    steps=self.settings.steps,
                    model=self.model,
                    root=self.roots[name],
                    publish_every=self.settings.publish_every,
                ),
                encoding="utf-8",
            )
            self.configs[name] = config

    def _metrics(self, name: str) -> Path:
        return self.work / f"{name}.jsonl"

    def _command(self, name: str, world: int, steps: int) -> list[str]:
        args = ["archon_lora.cli", "train", str(self.configs[name]), "--set", f"run.steps={steps}"]
        return torchrun(world, args) if world > 1 else [sys.executable, "-m", *args]

    def _train(self, name: str, world: int, steps: int) -> None:
        log = self.work / f"{name}-{world}-ranks-to-{steps}.log"
        with Child(self._command(name, world, steps), log=log, env=self.env) as child:
            child.succeed(self.settings.deadline_s)

    def _train_and_kill(self) -> None:
        s = self.settings
        metrics = self._metrics("job")
        log = self.work / "job-killed.log"
        with Child(self._command("job", s.world, s.steps), log=log, env=self.env) as child:
            child.until(
                lambda: metrics.exists() and s.kill_after in read_metrics(metrics),
                s.deadline_s,
                f"metrics of step {s.kill_after}",
            )
            os.kill(read_events(metrics, "start")[-1]["pids"][1], signal.SIGKILL)
            killed = time.perf_counter()
            status = child.wait(s.deadline_s)
            took = time.perf_counter() - killed
        self.killed_at = max(read_metrics(metrics))
        self.report.check(
            "a dead rank ends the run, with a status that says so",
            f"status {status}, {took:.1f} s after the SIGKILL",
            passed=status != 0,
        )

    def _export_and_compare(self) -> None:
        s = self.settings
        export = self.work / "export"
        last = s.steps - 1
        command = [
            *("export", self.roots["job"], str(export)),
            *("--step", str(last), "--dtype", "float32"),
        ]
        self._ckpt("export", command)
        compare = [sys.executable, "-m", "archon_lora.rl.demo.compare"]
        arguments = [str(self.configs["job"]), str(last), str(export)]
        found = run_child(
            [*compare, *arguments],
            log=self.work / "compare.log",
            env=self.env,
            timeout=s.deadline_s,
        )
        findings.check_comparison(self.report, json.loads(found), step=last, world=s.world)

    def _verify(self) -> None:
        root = self.roots["job"]
        verified = json.loads(self._ckpt("verify", ["verify", root, "--json"]))
        listed = json.loads(self._ckpt("ls", ["ls", root, "--json"]))
        findings.check_storage(
            self.report,
            verified,
            listed,
            last_step=self.settings.steps + self.settings.more_steps - 1,
        )

    def _ckpt(self, name: str, arguments: list[str]) -> str:
        return run_child(
            [sys.executable, "-m", "ckpt.cli", *arguments],
            log=self.work / f"ckpt-{name}.log",
            env=self.env,
            timeout=self.settings.deadline_s,
        )

    def _compare_runs(self) -> None:
        s = self.settings
        reference = read_metrics(self._metrics("reference"))
        job = read_metrics(self._metrics("job"))
        starts = read_events(self._metrics("job"), "start")
        findings.check_reward(self.report, reference, margin=s.margin)
        findings.check_resume(
            self.report,
            reference={k: r for k, r in reference.items() if k < s.steps},
            job_lines=[
                r for r in read_records(self._metrics("job")) if r.get("step", s.steps) < s.steps
            ],
            starts=starts,
            killed_at=self.killed_at,
        )
        findings.check_one_rank(self.report, reference, job, starts[-1])
        findings.check_staleness(self.report, [*reference.values(), *job.values()], bound=1)
        findings.note_costs(self.report, reference, job)
        draw(
            self.out / "reward.png",
            reference=reference,
            joined=job,
            killed_after=self.killed_at,
            resumed_at=starts[1]["step_from"],
            moved_at=starts[-1]["step_from"],
        )


def _child_environment() -> dict[str, str]:
    """This process's environment, made fit for children that must not reach out."""
    env = dict(os.environ)
    env |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    # gloo would resolve the host's own name, which a container without a network may not know.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if loopback:
        env["GLOO_SOCKET_IFNAME"] = loopback[0]
    return env
