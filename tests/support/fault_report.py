"""Which fault cells a run takes, and the line that it ends with.

``CKPT_FAULTS=full`` takes every cell; otherwise each table gives a few, drawn with a seed that is
printed. It is the same for everybody, so that a commit passes today and tomorrow alike;
``CKPT_FAULTS_SEED`` draws others.
"""

from __future__ import annotations

import hashlib
import os

import pytest

MODE, SEED = "CKPT_FAULTS", "CKPT_FAULTS_SEED"
PROPERTY = "fault cells"


def pytest_configure(config: pytest.Config) -> None:
    """Fix the seed before any worker starts, so that all of them draw alike."""
    mode = os.environ.setdefault(MODE, "sample")
    if mode not in {"sample", "full"}:
        msg = f"{MODE} must be sample or full, got {mode!r}"
        raise pytest.UsageError(msg)
    os.environ.setdefault(SEED, "0")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cells that were not drawn."""
    # Who names a single test means it.
    if os.environ[MODE] == "full" or any("::" in str(arg) for arg in config.args):
        return
    tables: dict[str, list[pytest.Item]] = {}
    limits: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("cells")
        if marker is not None:
            table = item.nodeid.partition("[")[0]
            tables.setdefault(table, []).append(item)
            limits[table] = marker.args[0]
    dropped = set()
    for table, cells in tables.items():
        dropped.update(sorted(cells, key=lambda item: draw(item.nodeid))[limits[table] :])
    if dropped:
        config.hook.pytest_deselected(items=[item for item in items if item in dropped])
        items[:] = [item for item in items if item not in dropped]


def draw(name: str) -> bytes:
    """A number that seed and name decide."""
    return hashlib.sha256(f"{os.environ[SEED]}:{name}".encode()).digest()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line: how many cells and restores there were, and how many went wrong in silence."""
    found: dict[str, int] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, counts in getattr(report, "user_properties", ()):
                if name == PROPERTY and getattr(report, "when", "") == "teardown":
                    for key, count in counts.items():
                        found[key] = found.get(key, 0) + count
    if found:
        terminalreporter.write_sep("=", "fault matrix")
        terminalreporter.write_line(
            f"{os.environ[MODE]} (seed {os.environ[SEED]}): {found['cells']} cells, "
            f"{found['restores']} restores, {found['refusals']} refusals, "
            f"silent-bad = {found['silent_bad']}"
        )
