"""SIGKILL of each rank at every named point of write and commit, on every kind of store.

The table is made from the list of points, so that a new point has cells as soon as it exists.
Where a rank does not pass a point on some store, the reason stands in ``OUT_OF_REACH``.
"""

from __future__ import annotations

import signal
from fnmatch import fnmatch
from typing import Any

import pytest
from support.fault_cells import FLAVOURS, NEWEST, RUN_SECONDS, Field
from support.fault_report import draw
from support.forked import Crew
from support.ranks_faults import train

from ckpt.storage.faultpoints import JOB_POINTS, POINTS, UPLOAD_POINTS

pytestmark = pytest.mark.dist

DEADLINE = 3.0
"""Seconds of the vote: a dead or hung rank costs the others this long."""

# (flavour, rank, points) → why no trainer of the matrix passes them there.
OUT_OF_REACH = {
    ("posix", "*", "object.*"): "a directory is not written through the object store's code",
    ("s3*", "*", "posix.*"): "an object store is not written through the directory's code",
    ("s3", "*", "object.multipart.*"): "files below the limit of one PUT; see s3-parts",
    ("*", "1", "commit.*"): "rank 0 commits",
    ("*", "1", "*.put_new.*"): "rank 0 claims epochs and versions and creates manifests",
    ("*", "1", "posix.rename_dir.*"): "rank 0 renames: the commit and retention",
    ("*", "*", "upload.*"): "the uploader of a local tier passes them; see test_tiers.py",
    ("*", "*", "job.*"): "a service's job passes them; see test_service_sigkill.py",
}


def reason(flavour: str, rank: int, point: str) -> str | None:
    """Why a rank cannot pass a point, or None if it does."""
    for (flavours, ranks, points), why in OUT_OF_REACH.items():
        if fnmatch(flavour, flavours) and fnmatch(str(rank), ranks) and fnmatch(point, points):
            return why
    return None


ALL = [(f, rank, point) for f in FLAVOURS for rank in (0, 1) for point in sorted(POINTS)]


def case(*values: Any) -> Any:
    """A row of a table; those on an object store need the server."""
    marks = [pytest.mark.s3] if str(values[0]).startswith("s3") else []
    return pytest.param(*values, marks=marks)


CELLS = [case(*cell) for cell in ALL if reason(*cell) is None]


@pytest.mark.parametrize("flavour", [case(flavour) for flavour in FLAVOURS])
def test_every_point_is_passed_or_its_absence_explained(field: Field, flavour: str) -> None:
    passes = field.plant(flavour).passes
    for _flavour, rank, point in (cell for cell in ALL if cell[0] == flavour):
        passed = passes[rank].get(point, 0)
        why = reason(flavour, rank, point)
        if why is None:
            assert passed, f"rank {rank} never passes {point} on {flavour}: say why or reach it"
        else:
            assert not passed, f"rank {rank} does pass {point} on {flavour}, though: {why}"


def test_no_point_is_out_of_reach_everywhere() -> None:
    for point in POINTS.difference(UPLOAD_POINTS, JOB_POINTS):
        assert any(reason(f, rank, p) is None for f, rank, p in ALL if p == point), point


def passes_to_try(field: Field, flavour: str, rank: int, point: str) -> list[int]:
    """Which passes of a point are tried: each of them in a full run, else one or two."""
    count = field.plant(flavour).passes[rank][point]
    everyone = list(range(1, count + 1))
    return sorted(everyone, key=lambda nth: draw(f"{flavour} {rank} {point} {nth}"))


@pytest.mark.cells(7)
@pytest.mark.parametrize(("flavour", "victim", "point"), CELLS)
def test_a_rank_is_killed(
    field: Field, flavour: str, victim: int, point: str, sampled: bool
) -> None:
    tries = passes_to_try(field, flavour, victim, point)
    for nth in tries[:1] if sampled else tries:
        ground = field.ground(flavour)
        fault = f"{point}:{nth}=kill"
        script = ground.script(fault=fault, victim=victim, deadline=DEADLINE, close=False)
        with Crew(2, train, script) as crew:
            crew.join(timeout=RUN_SECONDS)
            assert crew.died(victim)
            seen = crew.result(1 - victim)
        committed = max(ground.committed())[0]
        assert committed in {NEWEST, NEWEST + 1}
        if committed == NEWEST:
            assert seen.committed == []
            assert seen.errors, "the survivor was told nothing"
        ground.go_on(committed)


@pytest.mark.cells(1)
@pytest.mark.parametrize(("flavour", "victim", "point"), CELLS)
def test_a_rank_hangs(field: Field, flavour: str, victim: int, point: str, sampled: bool) -> None:
    """The others give up in time; the next trainer goes on while the hung process still lives."""
    tries = passes_to_try(field, flavour, victim, point)
    for nth in tries[: 1 if sampled else 3]:
        ground = field.ground(flavour)
        script = ground.script(fault=f"{point}:{nth}=hang", victim=victim, deadline=DEADLINE)
        with Crew(2, train, script) as crew:
            crew.join(1 - victim, timeout=RUN_SECONDS)
            seen = crew.result(1 - victim)
            assert seen.took < 2 * 2 * DEADLINE + 5, "a hung rank holds the others for too long"
            committed = max(ground.committed())[0]
            if committed == NEWEST:
                assert seen.committed == []
                assert seen.errors, "the survivor was told nothing"
            ground.go_on(committed)


@pytest.mark.cells(3)
@pytest.mark.parametrize(
    ("flavour", "point"),
    [case(f, point) for f, rank, point in ALL if rank == 0 and reason(f, rank, point) is None],
)
def test_a_trainer_sleeps_and_wakes_up_stale(
    field: Field, flavour: str, point: str, sampled: bool
) -> None:
    """Stopped at a point, both ranks; another trainer takes over; then the first goes on."""
    tries = passes_to_try(field, flavour, 0, point)
    for nth in tries[:1] if sampled else tries:
        ground = field.ground(flavour)
        script = ground.script(fault=f"{point}:{nth}=stop", victim=0, saves=(2, 3), armed=2)
        with Crew(2, train, script) as crew:
            crew.wait_stopped(0, RUN_SECONDS)
            crew.signal(1, signal.SIGSTOP)
            committed = max(ground.committed())[0]
            ground.go_on(committed)
            newest = committed + 1
            crew.signal(0, signal.SIGCONT)
            crew.signal(1, signal.SIGCONT)
            crew.join(timeout=RUN_SECONDS)
            seen = [crew.result(rank) for rank in (0, 1)]
        for rank in seen:
            assert 3 not in rank.committed, "a stale trainer commits nothing more"
            assert any(kind == "Superseded" for _step, kind, _text in rank.errors), rank.errors
        ground.restore(newest)
        ground.go_on(newest, tag="d")
