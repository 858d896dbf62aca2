"""Publishers and readers as processes: at once, and killed at every named point."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from support.forked import Crew
from support.publishers import (
    LAST_STEP,
    fetch_under_fault,
    publish,
    publish_group,
    publish_under_fault,
    watch,
)

from ckpt.handoff import Registry
from ckpt.storage import open_storage
from ckpt.storage.faultpoints import OBJECT_POINTS, POSIX_POINTS
from ckpt.versions import list_versions, read_version

pytestmark = pytest.mark.slow

SECONDS = 60
PUBLISHERS = 4
EACH = 3
PASSES = 5
"""A publish passes no point more often."""

S3_POINTS = [point for point in OBJECT_POINTS if "multipart" not in point]


@pytest.fixture(params=["posix", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any] | None]:
    """A root that several processes can share: URL and options."""
    if request.param == "posix":
        return str(tmp_path / "root"), None
    server = request.getfixturevalue("s3")
    return server.url("races"), server.storage_options


def test_four_processes_publish_at_once(place: tuple[str, dict[str, Any] | None]) -> None:
    url, options = place
    with contextlib.ExitStack() as stack:
        crews = [
            stack.enter_context(Crew(1, publish_group, url, "run7", EACH, options))
            for _ in range(PUBLISHERS)
        ]
        for crew in crews:
            crew.join(timeout=SECONDS)
        groups = [crew.result(0) for crew in crews]
    names = [name for group in groups for name in group]
    assert len(set(names)) == len(names) == PUBLISHERS * EACH
    assert all(group == sorted(group) for group in groups)
    storage = open_storage(url, options)
    for name in names:
        read_version(storage, name)
    whole = [entry.name for entry in list_versions(storage) if entry.state == "committed"]
    assert whole == sorted(names)
    latest = Registry(storage).latest()
    assert latest is not None
    assert latest.name == max(names)
    storage.close()


def test_a_waiting_reader_sees_whole_versions_only(
    place: tuple[str, dict[str, Any] | None], tmp_path: Path
) -> None:
    url, options = place
    points = POSIX_POINTS if options is None else S3_POINTS
    killed = 0
    with Crew(1, watch, url, "run7", str(tmp_path / "cache"), options) as reader:
        for point in points:
            died = 0
            for nth in range(1, PASSES + 1):
                fault = f"{point}:{nth}=kill"
                with Crew(1, publish_under_fault, url, "run7", fault, options) as publisher:
                    publisher.join(timeout=SECONDS)
                    if not publisher.died(0):
                        publisher.result(0)
                        break
                died += 1
            assert died, f"no publisher passed {point}"
            killed += died
        last = publish(url, "run7", LAST_STEP, options)
        reader.join(timeout=SECONDS)
        seen = reader.result(0)
    storage = open_storage(url, options)
    assert seen == sorted(set(seen))
    assert seen[-1] == last
    for name in seen:
        read_version(storage, name)
    states = [entry.state for entry in list_versions(storage)]
    assert set(states) <= {"committed", "claimed"}
    assert states.count("claimed") >= killed // 2  # most kills come before the commit
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == seen
    storage.close()


FETCH_POINTS = [point for point in POSIX_POINTS if "put_new" not in point]
"""A fetch creates nothing that others might create, too."""


def test_a_fetch_that_is_killed_leaves_no_half_version(tmp_path: Path) -> None:
    url = str(tmp_path / "root")
    name = publish(url, "run7")
    registry = Registry(url)
    for point in FETCH_POINTS:
        died = 0
        for nth in range(1, PASSES + 1):
            cache = tmp_path / f"{point}-{nth}"
            fault = f"{point}:{nth}=kill"
            with Crew(1, fetch_under_fault, url, str(cache), fault) as reader:
                reader.join(timeout=SECONDS)
                if not reader.died(0):
                    reader.result(0)
                    break
            died += 1
            left = {path.name: path.stat().st_ino for path in cache.iterdir()}
            assert all(item == name or item.startswith(f".tmp-{name}-") for item in left)
            found = registry.fetch(1, cache)
            assert found.stat().st_ino == left.get(name, found.stat().st_ino), "it was whole"
        assert died, f"no fetch passed {point}"
