"""A model directory, and engines that are closed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from support.engines import make_engine, tiny_model

from archon_lora.engine import ArchonEngine


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine_of(model_dir: str) -> Iterator[Callable[..., ArchonEngine]]:
    made: list[ArchonEngine] = []

    def make(path: str = model_dir, **options: object) -> ArchonEngine:
        made.append(make_engine(path, **options))
        return made[-1]

    yield make
    # The first engine made the default group, so it goes last.
    for engine in reversed(made):
        engine.close()
    assert not dist.is_initialized()
