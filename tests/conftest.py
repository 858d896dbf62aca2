"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.fault_report import (  # noqa: F401 - pytest finds its hooks by name
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_terminal_summary,
)
from support.s3_server import S3Server, running_server


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3Server]:
    """One S3 server for the whole run (for each xdist worker one)."""
    with running_server() as server:
        yield server


@pytest.fixture
def s3(s3_session: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server with an empty bucket of its own; child processes inherit its address."""
    for name, value in s3_session.environment.items():
        monkeypatch.setenv(name, value)
    return s3_session.with_new_bucket()
