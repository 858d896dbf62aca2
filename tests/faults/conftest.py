"""What every fault cell needs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.fault_cells import Field, Planted, Tally
from support.fault_report import MODE, PROPERTY


@pytest.fixture(scope="session")
def plants() -> dict[str, Planted]:
    """Roots as healthy trainers leave them, by flavour; made when first asked for."""
    return {}


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts what the test did, for the summary of the run."""
    tally = Tally()
    yield tally
    request.node.user_properties.append((PROPERTY, vars(tally)))


@pytest.fixture
def field(
    request: pytest.FixtureRequest, tally: Tally, plants: dict[str, Planted]
) -> Iterator[Field]:
    """Where the roots of the test's cells come from."""
    field = Field(lambda: request.getfixturevalue("s3"), tally, plants)
    yield field
    field.close()


@pytest.fixture
def sampled() -> bool:
    """Whether this run takes only a sample of the cells."""
    return os.environ[MODE] == "sample"
