"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest
from support.fault_report import (  # noqa: F401 - pytest finds its hooks by name
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)
from support.s3_server import S3Server, named_server, running_server

SERVER_AT_START = named_server()


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3Server]:
    """One S3 server for the whole run (for each xdist worker one)."""
    with running_server() as server:
        yield server


@pytest.fixture
def s3(s3_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server with an empty bucket of its own; child processes inherit its address."""
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    server = s3_session.for_a_test()
    yield server
    if SERVER_AT_START:
        server.clean()


REFUSAL = "could overwrite each other"
"""What the refusal of a store that cannot keep two writers apart says."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Count a test as skipped when the server that the environment names was refused.

    Such a server cannot do what most tests are about, and being told so is what is promised for
    it. That no other server is refused, tests/contract/test_s3_findings.py shows by itself.
    """
    report = yield
    if (
        report.failed
        and call.excinfo is not None
        and item.get_closest_marker("s3")
        and SERVER_AT_START
        and REFUSAL in report.longreprtext + report.capstderr  # that of child processes
    ):
        report.outcome = "skipped"
        reason = "the server was refused, loudly: it cannot keep two writers apart"
        report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
    return report
