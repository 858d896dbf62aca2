"""Who is let in, and that no operation can forget to ask."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.routing import iter_route_contexts
from support.published import publish_one
from support.serving import ADMIN, LEASE, READ, as_, serving, tokens

from ckpt.errors import ConfigError
from ckpt.service import RootSpec, ServiceConfig, create_app
from ckpt.service.auth import TokenSet, is_public, scopes_of, undeclared

BODIES = {"POST", "PUT", "PATCH"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("auth")
    publish_one(path / "lab")
    return path


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[httpx.Client]:
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ckpt.service.front.FAILED_BURST", 10_000)  # all of them come from here
            client = stack.enter_context(serving(place / "lab", tokens=tokens(place)))
        yield client


def operations(place: Path) -> list[tuple[str, str, int]]:
    """Method, path with its parameters filled in, and needed scope of every operation."""
    app = create_app(ServiceConfig([RootSpec("lab", str(place / "lab"))]))
    found = []
    for route in iter_route_contexts(app.routes):
        path = re.sub(r"\{run\}", "lab", route.path or "")
        path = re.sub(r"\{[a-z_]+(:path)?\}", "1", path)
        need = max(scopes_of(route), default=0)
        found += [(method, path, int(need)) for method in sorted(route.methods or ())]
    return found


def test_every_operation_asks_for_its_scope(client: httpx.Client, place: Path) -> None:
    known = operations(place)
    assert len(known) > 10
    for method, path, need in known:
        body = {"json": {}} if method in BODIES else {}
        if is_public(path):
            assert client.request(method, path, **body).status_code not in {401, 403}
            continue
        assert need, path
        answers = {"nobody": client.request(method, path, **body)}
        answers["wrong"] = client.request(method, path, headers=as_("x" * 20), **body)
        for answer in answers.values():
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for scope, token in enumerate((READ, LEASE, ADMIN), 1):
            if scope < need:
                answer = client.request(method, path, headers=as_(token), **body)
                assert answer.status_code == 403, (method, path, token)
        assert "/events" not in path or need == 1  # what is allowed there would never end
        if "/events" not in path:
            allowed = (READ, LEASE, ADMIN)[need - 1]
            fine = client.request(method, path, headers=as_(allowed), **body)
            assert fine.status_code not in {401, 403}, (method, path)


def test_an_operation_without_a_scope_is_found() -> None:
    app, router = FastAPI(), APIRouter(prefix="/v1")

    @router.get("/forgotten")
    async def forgotten() -> None: ...

    app.include_router(router)
    assert "/v1/forgotten" in undeclared(app)


def test_the_description_of_the_api_names_every_operation(client: httpx.Client) -> None:
    described = client.get("/v1/openapi.json", headers=as_(READ)).json()
    assert {"/v1/runs", "/v1/runs/{run}/latest", "/v1/runs/{run}/events"} <= set(described["paths"])


def test_other_machines_are_only_listened_to_with_tokens(place: Path) -> None:
    spec = RootSpec("lab", str(place / "lab"))
    with pytest.raises(ConfigError, match="--token-file"):
        ServiceConfig([spec], host="0.0.0.0")
    ServiceConfig([spec], host="0.0.0.0", tokens=tokens(place))


@pytest.mark.parametrize(
    "line",
    ["read short", "write 0123456789abcdef", "read", "read 0123456789abcdef a b", "read é" * 9],
)
def test_a_line_that_is_no_token_is_refused_and_not_quoted(line: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{line}\n")
    with pytest.raises(ConfigError) as refused:
        TokenSet.read(path)
    assert "0123456789abcdef" not in str(refused.value)


def test_tokens_may_be_hashed_and_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import hashlib

    hashed = hashlib.sha256(READ.encode()).hexdigest()
    monkeypatch.setenv("CKPT_SERVE_TOKENS", f"read sha256:{hashed} fleet; admin {ADMIN}")
    found = TokenSet.read(None)
    reader = found.principal(READ)
    assert reader is not None
    assert (reader.name, reader.scope.name) == ("fleet", "read")
    assert found.principal(hashed) is None
    assert READ not in repr(found)
    with pytest.raises(ConfigError, match="one name"):
        TokenSet([*found._tokens, *found._tokens])


def test_without_tokens_a_page_of_another_site_gets_nothing(place: Path) -> None:
    with serving(place / "lab") as client:
        assert client.get("/v1/runs").status_code == 200
        assert client.get("/v1/runs", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/healthz", headers={"Host": "evil.example"}).status_code == 403


def test_answers_carry_headers_that_keep_browsers_safe(client: httpx.Client) -> None:
    for path in ("/healthz", "/v1/runs", "/v1/nothing"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_guessing_is_slowed_down_and_stops_nobody_else(place: Path) -> None:
    with serving(place / "lab", tokens=tokens(place)) as client:
        statuses = [client.get("/v1/runs", headers=as_("x" * 20)).status_code for _ in range(60)]
        assert statuses[:50] == [401] * 50
        assert statuses[-1] == 429
        assert client.get("/v1/runs", headers=as_(READ)).status_code == 200


def test_a_cookie_opens_pages_and_changes_nothing_for_other_sites(place: Path) -> None:
    with serving(place / "lab", tokens=tokens(place)) as client:
        cookie = {"Cookie": f"ckpt_token={ADMIN}"}
        assert client.get("/v1/runs", headers=cookie).status_code == 200
        url = "/v1/runs/lab/pins/run7-v00000001"
        for site in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            refused = client.put(url, json={}, headers={**cookie, **site})
            assert refused.status_code == 403
        fine = client.put(url, json={}, headers={**cookie, "Sec-Fetch-Site": "same-origin"})
        assert fine.status_code == 200
        # A token in the header is shown on purpose; which page sent it does not matter.
        plain = {**as_(ADMIN), "Origin": "https://tool.example"}
        assert client.put(url, json={}, headers=plain).status_code == 200
