"""The API is what its description says: requests made from the schema, answers held against it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core import NOT_SET
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support.published import publish_one
from support.serving import ADMIN, as_, serving, tokens
from support.steps import tiny_adapter, write_step

from ckpt.service import Limits
from ckpt.storage import open_storage

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 200 if os.environ.get("CKPT_SERVICE") == "full" else 6
"""For each operation."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a service with steps and versions."""
    place = tmp_path_factory.mktemp("api")
    storage = open_storage(place / "lab")
    tensors, export = tiny_adapter()
    for step in range(2):
        write_step(storage, step, tensors, export=export)
        publish_one(place / "lab", seed=step)
    with pytest.MonkeyPatch.context() as patch:
        # Jobs are only recorded: what they do is tested elsewhere.
        patch.setattr("ckpt.service.jobs.runner.MOST_UNFINISHED", 100_000)
        limits = Limits(wait_s=0.01)
        with serving(place / "lab", tokens=tokens(place), job_workers=0, limits=limits) as client:
            yield str(client.base_url).rstrip("/")


@pytest.fixture(scope="module")
def described(service: str) -> dict[str, Any]:
    """The service's own description."""
    found = httpx.get(f"{service}/v1/openapi.json", headers=as_(ADMIN)).json()
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def schema(described: dict[str, Any]) -> Any:
    """As the generator takes it; a stream of events has no end that could be waited for."""
    paths = {path: item for path, item in described["paths"].items() if "/events" not in path}
    return schemathesis.openapi.from_dict({**described, "paths": paths})


def as_it_is(case: schemathesis.Case) -> None:
    """Mostly ask for things that are there; the rest finds out about those that are not."""
    known = {"run": "lab", "version": "run7-v00000001", "step": 1, "name": "run7-v00000001"}
    for name, value in known.items():
        if name in (case.path_parameters or {}) and crc32(repr(case).encode()) % 4:
            case.path_parameters[name] = value


def test_answers_are_what_the_description_says(schema: Any, service: str) -> None:
    tried = 0
    with httpx.Client(base_url=service, headers=as_(ADMIN), timeout=20) as client:
        for found in schema.get_all_operations():
            operation = found.ok()
            strategy = operation.as_strategy()

            @settings(
                max_examples=EXAMPLES,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def one(case: schemathesis.Case) -> None:
                nonlocal tried
                as_it_is(case)
                answer = ask(client, case)
                case.validate_response(answer, checks=CHECKS)
                tried += 1

            one()
    assert tried > 25 * EXAMPLES / 2


def ask(client: httpx.Client, case: schemathesis.Case) -> httpx.Response:
    """Send a case over a real connection."""
    body = None if case.body is NOT_SET else json.dumps(case.body).encode()
    headers = {} if body is None else {"Content-Type": "application/json"}
    headers |= {k: v for k, v in (case.headers or {}).items() if v.isascii() and v.isprintable()}
    return client.request(
        case.method, case.formatted_path, params=case.query or {}, content=body, headers=headers
    )


def test_the_description_is_whole(described: dict[str, Any]) -> None:
    names = set()
    for path, item in described["paths"].items():
        for method, operation in item.items():
            assert operation["description"], (method, path)
            names.add(operation["operationId"])
            if path.startswith("/v1"):
                assert {"401", "403", "422", "429", "503"} <= set(operation["responses"]), path
    assert len(names) == sum(len(item) for item in described["paths"].values())
