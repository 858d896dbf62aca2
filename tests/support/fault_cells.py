"""The ground a fault cell stands on, and the questions that are asked after every fault."""

from __future__ import annotations

import collections
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ckpt import CheckpointManager, CkptError
from ckpt.cli_commands import app
from ckpt.layout import MANIFEST, STEPS, parse_step_dir
from ckpt.restore import RestoreReport
from ckpt.storage import Storage, open_storage
from support.forked import Crew
from support.ranks_faults import Script, Seen, Toy, note, train

FLAVOURS = {
    "posix": "a local directory",
    "s3": "an object store, every file one PUT",
    "s3-parts": "an object store, shards as multipart uploads",
}
NEWEST = 1
"""The newest step of a planted root; the faulted trainer goes on with the next one."""
RUN_SECONDS = 60.0
"""No trainer of a cell may take longer, however busy the machine is."""


@dataclass
class Tally:
    """What the cells of one test came to; the summary of a run adds them up."""

    cells: int = 0
    restores: int = 0
    refusals: int = 0
    silent_bad: int = 0


@dataclass(frozen=True)
class Planted:
    """A root as a healthy trainer of two ranks left it: steps 0 and 1 of writer 1."""

    files: Mapping[str, bytes]
    digests: Mapping[int, str]
    passes: tuple[Mapping[str, int], ...]
    """By rank: the fault points of the next save, and how often each is passed."""


@dataclass
class Ground:
    """The root of one cell.

    Attributes:
        flavour: which kind of store, a key of ``FLAVOURS``.
        url: path or URL.
        options: storage options, or None.
        known: directory in which trainers note what they are about to save.
        tally: where results are counted.
    """

    flavour: str
    url: str
    options: Mapping[str, Any] | None
    known: str
    tally: Tally
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.storage = open_storage(self.url, self.options)

    def script(self, **changes: Any) -> Script:
        """A trainer on this root that saves the next step."""
        start = Script(
            root=self.url,
            options=self.options,
            tag="b",
            saves=(NEWEST + 1,),
            armed=NEWEST + 1,
            publish=True,
            latest=2,
            known=self.known,
            small_parts=self.flavour == "s3-parts",
        )
        return replace(start, **changes)

    def plant(self, planted: Planted) -> None:
        """Fill the root."""
        for path, data in planted.files.items():
            if self.flavour == "posix":
                target = Path(self.url, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            else:
                self.storage.put(path, data)
        for step, digest in planted.digests.items():
            Path(self.known, f"{step}.txt").write_text(f"{digest}\n")

    def committed(self) -> set[tuple[int, int]]:
        """(step, epoch) of every step directory that shows a manifest: a look of our own."""
        found = set()
        for entry in self.storage.list(STEPS):
            pair = parse_step_dir(entry.name)
            if pair is not None and self.storage.exists(f"{STEPS}/{entry.name}/{MANIFEST}"):
                found.add(pair)
        return found

    def saved(self, step: int) -> list[str]:
        """Digests of what trainers were about to save as a step."""
        return Path(self.known, f"{step}.txt").read_text().split()

    def judge(self, step: int | None, digest: str, wanted: int | None = None) -> None:
        """Count a restore, and demand that it gave what was saved under that number."""
        self.tally.restores += 1
        good = step is not None and digest in self.saved(step)
        if not good or (wanted is not None and step != wanted):
            self.tally.silent_bad += 1
            msg = f"restored step {step}, wanted {wanted}; bit for bit what was saved: {good}"
            raise AssertionError(msg)

    def restore(
        self, wanted: int, *, digest: str | None = None, damaged: str | None = None
    ) -> RestoreReport:
        """A fresh trainer of one rank restores.

        Args:
            wanted: the step that it must get.
            digest: what exactly that is, where several trainers saved such a step.
            damaged: what the message about a newer, damaged step must name; None: no message.
        """
        toy = Toy()
        with CheckpointManager(self.url, storage_options=self.options) as manager:
            step = manager.restore(toy.state)
            report = manager.last_restore
        assert report is not None
        self.judge(step, toy.digest(), wanted)
        assert digest in (None, toy.digest())
        reasons = [entry.reason for entry in report.damaged]
        assert bool(reasons) == (damaged is not None), reasons
        assert all(damaged is not None and damaged in reason for reason in reasons), reasons
        return report

    def refuses(self, *words: str) -> None:
        """A restore ends in an error of ours that has the words in it; nothing is restored."""
        toy = Toy()
        before = toy.digest()
        with CheckpointManager(self.url, storage_options=self.options) as manager:
            try:
                step = manager.restore(toy.state)
                said = None
            except CkptError as error:
                said = str(error)
        if said is None:
            self.tally.silent_bad += 1
            raise AssertionError(f"the restore went through and gave step {step}")
        assert [word for word in words if word not in said] == [], said
        assert toy.digest() == before, "a refused restore changes nothing"
        self.tally.refusals += 1

    def verify(self) -> list[str]:
        """Paths that ``ckpt verify`` calls damaged; the command itself is run."""
        arguments = ["verify", self.url, "--json"]
        if self.options:
            arguments += ["--endpoint-url", str(self.options["endpoint_url"])]
        done = CliRunner().invoke(app, arguments)
        report = json.loads(done.stdout)
        damaged = [item["path"] for item in report["checked"] if item["problems"]]
        assert (done.exit_code == 0) == report["ok"] == (not damaged), done.output
        return damaged

    def go_on(
        self, newest: int, *, tag: str = "c", damaged: str | None = None, records: str = ""
    ) -> str:
        """After a fault: the newest step is there, the next trainer saves, and all verifies.

        Args:
            newest: the step that must be restored.
            tag: the next trainer's.
            damaged: what the messages about one damaged step name; None: no step is damaged.
            records: the one writer's record that does not verify, or ``""``.

        Returns:
            The digest of the step that the next trainer saved.
        """
        toy = Toy(tag=tag)
        with CheckpointManager(self.url, storage_options=self.options) as manager:
            step = manager.restore(toy.state)
            self.judge(step, toy.digest(), newest)
            assert manager.last_restore is not None
            assert bool(manager.last_restore.damaged) == (damaged is not None)
            toy.step()
            digest = toy.digest()
            note(self.known, newest + 1, digest)
            manager.save(newest + 1, toy.state, publish=True)
        self.restore(newest + 1, digest=digest)
        bad = self.verify()
        if damaged is None:
            assert bad == [records] * bool(records)
        else:
            assert len(bad) <= 1, bad
        return digest


def run_trainer(script: Script, world: int = 2) -> list[Seen]:
    """A trainer to which nothing is done; what its ranks saw."""
    with Crew(world, train, script) as crew:
        crew.join(timeout=RUN_SECONDS)
        return [crew.result(rank) for rank in range(world)]


def make_planted(ground: Ground) -> Planted:
    """Train on an empty root, and on a copy of it count the fault points of the next save."""
    first = ground.script(tag="a", saves=(0, NEWEST), publish=False, latest=9)
    for seen in run_trainer(first):
        assert seen.errors == [], seen.errors
        assert seen.committed == [0, NEWEST]
    files = dict(walk(ground.storage))
    digests = {step: ground.saved(step)[0] for step in (0, NEWEST)}
    seen = run_trainer(ground.script(trace=True))
    assert [rank.errors for rank in seen] == [[], []]
    return Planted(files, digests, tuple(rank.passed for rank in seen))


def walk(storage: Storage, path: str = "") -> Iterator[tuple[str, bytes]]:
    """Every file of a root and its content."""
    for entry in storage.list(path):
        inner = f"{path}/{entry.name}" if path else entry.name
        if entry.is_dir:
            yield from walk(storage, inner)
        else:
            yield inner, storage.read(inner)


class Field:
    """Makes grounds; plants of one kind are grown once and copied afterwards.

    Args:
        s3: the server, asked for when a flavour needs it.
        tally: where results are counted.
        plants: grown plants by flavour; outlives the test.
    """

    def __init__(self, s3: Any, tally: Tally, plants: dict[str, Planted]) -> None:
        self._s3 = s3
        self._tally = tally
        self._plants = plants
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Remove every ground."""
        self._stack.close()

    def empty(self, flavour: str) -> Ground:
        """A root without anything."""
        known = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="known-"))
        if flavour == "posix":
            url = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="root-"))
            ground = Ground(flavour, url, None, known, self._tally)
        else:
            server = self._s3()
            ground = Ground(flavour, server.url(), server.storage_options, known, self._tally)
        self._stack.callback(ground.storage.close)
        return ground

    def plant(self, flavour: str) -> Planted:
        """What a healthy trainer leaves on such a store."""
        if flavour not in self._plants:
            self._plants[flavour] = make_planted(self.empty(flavour))
        return self._plants[flavour]

    def ground(self, flavour: str) -> Ground:
        """A root with two committed steps: a new cell."""
        planted = self.plant(flavour)
        ground = self.empty(flavour)
        ground.plant(planted)
        self._tally.cells += 1
        return ground


def totals(tallies: list[Tally]) -> Tally:
    """The sum of several tests' counts."""
    counts: collections.Counter[str] = collections.Counter()
    for tally in tallies:
        counts.update(vars(tally))
    return Tally(**{name: counts[name] for name in vars(Tally())})
