"""Two trainers on one root, one that went back on purpose, and clocks that run backwards."""

from __future__ import annotations

import signal

import pytest
from support.fault_cells import NEWEST, RUN_SECONDS, Field, Ground, run_trainer
from support.forked import Crew
from support.ranks_faults import train

from ckpt.layout import step_dir, writer_path
from ckpt.manifest import StepManifest, WriterRecord

pytestmark = pytest.mark.dist

FLAVOURS = ["posix", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.mark.cells(1)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_two_trainers_at_once(field: Field, flavour: str, number: int) -> None:
    """Each rank of both is told, or its steps count; there is one line of steps afterwards."""
    ground = field.ground(flavour)
    scripts = [
        ground.script(tag=tag, saves=(2, 3, 4, 5), publish=False, latest=9, deadline=10.0)
        for tag in ("b", "c")
    ]
    with Crew(2, train, scripts[0]) as one, Crew(2, train, scripts[1]) as two:
        one.join(timeout=RUN_SECONDS)
        two.join(timeout=RUN_SECONDS)
        seen = [[crew.result(rank) for rank in (0, 1)] for crew in (one, two)]
    for trainer in seen:
        assert trainer[0].committed == trainer[1].committed
        for rank in trainer:
            told = [kind for _step, kind, _text in rank.errors]
            assert len(rank.committed) == 4 or "Superseded" in told, rank.errors
    winners = [trainer for trainer in seen if 5 in trainer[0].committed]
    if winners:
        ground.go_on(5)
    else:
        newest = max((step for trainer in seen for step in trainer[0].committed), default=NEWEST)
        assert newest < 5
        settle(ground)


def settle(ground: Ground) -> None:
    """Neither trainer got to the end: what is restored is what the newest writer committed."""
    epochs = [epoch for _step, epoch in ground.committed()]
    newest = max(step for step, epoch in ground.committed() if epoch == max(epochs))
    ground.go_on(newest)


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_stale_trainer_deletes_nothing(field: Field, flavour: str) -> None:
    """It sleeps between its commit and its retention, which would keep one step only."""
    ground = field.ground(flavour)
    point = "commit.after_manifest=stop"
    script = ground.script(fault=point, victim=0, latest=1, publish=False)
    with Crew(2, train, script) as crew:
        crew.wait_stopped(0, RUN_SECONDS)
        ground.go_on(NEWEST + 1)
        before = ground.committed()
        assert len(before) == 3
        crew.signal(0, signal.SIGCONT)
        crew.join(timeout=RUN_SECONDS)
    assert ground.committed() == before
    ground.go_on(NEWEST + 2, tag="d")


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_retention_spares_what_a_lost_record_hides(field: Field, flavour: str) -> None:
    """Whether the lost writer had resumed from those steps or left them behind, nobody knows."""
    ground = field.ground(flavour)
    ground.go_on(NEWEST)
    ground.storage.delete(writer_path(2))
    (seen, _) = run_trainer(ground.script(saves=(3, 4), armed=3, latest=1))
    assert seen.errors == []
    assert {step for step, _epoch in ground.committed()} == {0, 1, 4}
    ground.go_on(4, tag="d")
    assert {0, 1} < {step for step, _epoch in ground.committed()}


@pytest.mark.cells(1)
@pytest.mark.parametrize("latest", [2, 9])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_deliberate_rollback(field: Field, flavour: str, latest: int) -> None:
    """After ``restore(step=0)`` the old step 1 does not come back, whatever its number."""
    ground = field.ground(flavour)
    first = run_trainer(ground.script(saves=(2, 3), publish=False, latest=9))
    assert [rank.committed for rank in first] == [[2, 3], [2, 3]]
    back = ground.script(tag="r", restore_step=0, saves=(1,), publish=False, latest=latest)
    for rank in run_trainer(back):
        assert rank.errors == []
        assert (rank.start, rank.committed) == (0, [1])
    ground.restore(1, digest=ground.saved(1)[-1])
    assert ground.saved(1)[-1] != ground.saved(1)[0]
    ground.go_on(1)


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_rollback_that_died_before_its_first_step(field: Field, flavour: str) -> None:
    """It claimed its epoch and no more: the next trainer goes on from where it had gone back to."""
    ground = field.ground(flavour)
    point = "posix.put_new.after_link" if flavour == "posix" else "object.put_new.after"
    script = ground.script(
        tag="r", restore_step=0, saves=(1,), armed=1, fault=f"{point}=kill", victim=0, close=False
    )
    with Crew(2, train, script) as crew:
        crew.join(timeout=RUN_SECONDS)
        assert crew.died(0)
    ground.go_on(0)


@pytest.mark.cells(1)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_clock_runs_backwards(field: Field, flavour: str) -> None:
    """What is newest follows from epochs and step numbers; the stamps say the opposite."""
    ground = field.ground(flavour)
    for epoch, year in ((2, 2011), (3, 1999), (4, 1971)):
        step = epoch
        for rank in run_trainer(ground.script(saves=(step,), year=year, latest=9, publish=False)):
            assert rank.errors == []
            assert (rank.start, rank.committed) == (step - 1, [step])
        data = ground.storage.read(writer_path(epoch))
        assert WriterRecord.from_bytes(data, "x").started.startswith(f"{year}-01-01")
        data = ground.storage.read(f"{step_dir(step, epoch)}/MANIFEST.json")
        assert StepManifest.from_bytes(data, "x").created.startswith(f"{year}-01-01")
    ground.restore(4)
    ground.go_on(4)
