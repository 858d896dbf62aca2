"""``ckpt serve``: lookups of the newest version, news of a commit, and long listings.

Two roots: a small one, and one with 10 000 steps of ten objects and as many versions. A service
is a process of its own; commits are made in this one, by the rename that makes a version exist.
"""

from __future__ import annotations

import http.client
import json
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import torch

from ckpt.checksum import file_record
from ckpt.handoff import Registry
from ckpt.layout import MANIFEST, claim_path, new_attempt, step_dir, version_dir, writer_path
from ckpt.manifest import StepManifest, VersionManifest, WriterRecord
from ckpt.publish import publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.types import AdapterExport, TensorRule

from .processes import Settings
from .rounds import Sample, interleave

SMALL, LARGE = 10, 10_000
OBJECTS: Final = 10
"""In each step."""
RUN: Final = "bench"
CALLERS: Final = 4
LOOKUP_S: Final = 0.5
COMMITS: Final = 50
PAGE: Final = 1000
NAMES: Final = {SMALL: "10 steps and versions", LARGE: "10 000 steps and versions"}


def service(settings: Settings, large: int = LARGE) -> dict[str, Any]:
    """Lookups, news and listings, for a small root and a large one."""
    with ExitStack() as stack:
        trials = []
        listings = {}
        for count in (SMALL, large):
            root = settings.folder / f"service-{count}"
            fill(root, count)
            stack.callback(shutil.rmtree, root, ignore_errors=True)
            port = stack.enter_context(served(root, settings.folder / f"service-{count}.log"))
            name = NAMES.get(count, f"{count} steps and versions")
            listings[name] = listing(port)
            trials.append(Asked(name, root, port, count))
        rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds)
    return {"rounds": rounds, "listings": listings, "objects": large * OBJECTS}


def fill(root: Path, count: int) -> None:
    """Steps of ten objects and versions, as many as ``count``; only the newest version is whole."""
    storage = open_storage(root)
    publish_first(root)
    template = VersionManifest.from_bytes(
        storage.read(f"{version_dir(RUN, 1)}/{MANIFEST}"), "the first version"
    )
    (root / "adapters" / f"{RUN}-v00000001").rename(root / "template")
    for number in range(1, count + 1):
        (root / claim_path(RUN, number)).touch()
        (root / version_dir(RUN, number)).mkdir()
    commit(root, template, count)
    record = WriterRecord(1, None, None, "bench", 1, template.created, new_attempt())
    storage.put(writer_path(1), record.to_bytes())
    data = b"x" * 64
    files = [file_record(f"part-{index}.json", [data]) for index in range(OBJECTS - 1)]
    for step in range(count):
        path = root / step_dir(step, 1)
        path.mkdir(parents=True)
        for file in files:
            (path / file.name).write_bytes(data)
        manifest = StepManifest(
            step=step,
            epoch=1,
            attempt=new_attempt(),
            created=template.created,
            writer_version="bench",
            world_size=OBJECTS - 1,
            mesh=None,
            fingerprint="0" * 64,
            base=None,
            export=None,
            tensors=(),
            files=tuple(files),
            adapter_sha256=None,
            policy_version=step,
        )
        (path / MANIFEST).write_bytes(manifest.to_bytes())


def publish_first(root: Path) -> None:
    """A small adapter, whose files all versions here share."""
    values = {f"m.lora_{side}.weight": torch.ones(4, 4) for side in ("a", "b")}
    rules = tuple(
        TensorRule(name, f"base_model.model.m.lora_{name[7].upper()}.weight") for name in values
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["m"], "bias": "none"}
    publish_version(
        open_storage(root),
        run=RUN,
        export=AdapterExport(config, rules),
        source=MemorySource(values),
        step=0,
        policy_version=0,
        epoch=1,
        attempt=new_attempt(),
        base=None,
    )


def commit(root: Path, template: VersionManifest, number: int) -> float:
    """Make a version exist; when its name appeared, on the monotonic clock."""
    name = f"{RUN}-v{number:08d}"
    work = root / "adapters" / f".tmp-{name}-{new_attempt()}"
    shutil.copytree(root / "template", work)
    made = replace(template, number=number, name=name)
    (work / MANIFEST).write_bytes(made.to_bytes())
    (root / claim_path(RUN, number)).touch()
    target = root / version_dir(RUN, number)
    if target.exists():
        target.rmdir()  # room that was made for it
    began = time.monotonic()
    work.rename(target)
    return began


@contextmanager
def served(root: Path, log: Path) -> Iterator[int]:
    """A service on the root; its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [
        *(sys.executable, "-c", "from ckpt.cli import main; main()", "serve"),
        *("--root", f"lab={root}", "--listen", f"127.0.0.1:{port}", "--rate", "1000000"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                _get(port, "/healthz")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(log.read_text(errors="replace")[-3000:]) from None
                time.sleep(0.05)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def _get(port: int, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("GET", path)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def listing(port: int) -> dict[str, float]:
    """All steps page by page: milliseconds of the first time, and of a second one."""
    found = {}
    for key in ("first", "again"):
        began = time.perf_counter()
        before, rows = "", 0
        while True:
            page = _get(port, f"/v1/runs/lab/steps?limit={PAGE}{before}")
            rows += len(page["steps"])
            if page["next"] is None:
                break
            before = f"&before={page['next']}"
        found[key] = 1e3 * (time.perf_counter() - began)
        found["steps"] = float(rows)
    began = time.perf_counter()
    _get(port, "/v1/runs/lab/entries/steps")
    found["entries"] = 1e3 * (time.perf_counter() - began)
    return found


class Asked:
    """A root, asked over HTTP and told about by server-sent events.

    Args:
        name: what the tables call it.
        root: its directory.
        port: of the service.
        newest: number of its newest version.
    """

    def __init__(self, name: str, root: Path, port: int, newest: int) -> None:
        self.name = name
        self._root, self._port, self._newest = root, port, newest
        found = (root / version_dir(RUN, newest) / MANIFEST).read_bytes()
        self._template = VersionManifest.from_bytes(found, "the newest version")

    def measure(self, number: int) -> Sample:
        """``lookup``: ms of one among four callers, ``rate``: of all of them in a second.

        ``notice`` and ``notice_p99``: ms from commits to the events; ``poll`` and ``poll_p99``: to
        a reader of the root itself who lists it every 20 ms.
        """
        del number
        rate = self._lookups()
        sample = {"rate": rate, "lookup": 1e3 * CALLERS / rate}
        for key, times in (("notice", self._told()), ("poll", self._found_by_polling())):
            cuts = quantiles(times, n=100, method="inclusive")
            sample |= {key: 1e3 * cuts[49], f"{key}_p99": 1e3 * cuts[98]}
        return sample

    def _lookups(self) -> float:
        counts: list[int] = []

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            done, until = 0, time.perf_counter() + LOOKUP_S
            while time.perf_counter() < until:
                connection.request("GET", "/v1/runs/lab/latest")
                connection.getresponse().read()
                done += 1
            connection.close()
            counts.append(done)

        threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.perf_counter() - began)

    def _told(self) -> list[float]:
        seen: dict[str, float] = {}
        ready = threading.Event()
        last = f"{RUN}-v{self._newest + COMMITS:08d}"

        def listen() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
            connection.request("GET", "/v1/runs/lab/events")
            answer = connection.getresponse()
            ready.set()
            while last not in seen:
                line = answer.readline()
                if line.startswith(b"id: "):
                    seen[line[4:].strip().decode()] = time.monotonic()
            connection.close()

        thread = threading.Thread(target=listen)
        thread.start()
        ready.wait(60)
        time.sleep(0.3)  # the first look of a listener is over
        made = self._commit_all()
        thread.join(60)
        return [seen[name] - at for name, at in made.items() if name in seen]

    def _found_by_polling(self) -> list[float]:
        seen: dict[str, float] = {}
        last, floor = f"{RUN}-v{self._newest + COMMITS:08d}", self._newest
        registry = Registry(self._root, run=RUN)

        def poll() -> None:
            number = floor
            while last not in seen:
                found = registry.wait_for(number, timeout=60)
                seen[found.name] = time.monotonic()
                number = found.number

        thread = threading.Thread(target=poll)
        thread.start()
        made = self._commit_all()
        thread.join(60)
        registry.close()
        return [seen[name] - at for name, at in made.items() if name in seen]

    def _commit_all(self) -> dict[str, float]:
        made = {}
        for _ in range(COMMITS):
            time.sleep(random.uniform(0.02, 0.06))  # in no step with anybody's looks
            self._newest += 1
            name = f"{RUN}-v{self._newest:08d}"
            made[name] = commit(self._root, self._template, self._newest)
        return made
