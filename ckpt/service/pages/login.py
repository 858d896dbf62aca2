"""A token in a browser: a form, a cookie that no script can read, and the way out."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from ckpt.service.auth import COOKIE, MAX_TOKEN, Gate, principal_of, same_origin
from ckpt.service.limits import RateLimit

from .render import page

TRIES_PER_SECOND: Final = 0.5
TRIES: Final = 10
"""Of one address: a person mistypes a few times, a guesser needs many."""

router = APIRouter(include_in_schema=False)
_tries = RateLimit(TRIES_PER_SECOND, TRIES)


@router.get("/login")
async def show_login(request: Request) -> Response:
    """The form; who is known already is sent on."""
    if principal_of(request) is not None:
        return RedirectResponse("/", 303)
    return page(request, "login.html", {"problem": None})


@router.post("/login")
async def login(request: Request) -> Response:
    """Take a token, and have the browser keep it until it is closed."""
    # Otherwise a page elsewhere could make somebody look at what its author may see.
    if not same_origin(request.headers):
        raise HTTPException(403, "a page of another origin may not sign anybody in")
    wait = _tries.wait_s(request.client.host if request.client else "unknown")
    if wait:
        return page(
            request, "login.html", {"problem": "Too many tries. Wait a moment."}, status=429
        )
    gate: Gate = request.app.state.gate
    token = _token(await request.body())
    if not token or gate.login(token) is None:
        return page(request, "login.html", {"problem": "That token is not known."}, status=422)
    answer = RedirectResponse("/", 303)
    answer.set_cookie(
        COOKIE, token, httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return answer


@router.post("/logout")
async def logout(request: Request) -> Response:
    """Forget the token."""
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def _token(body: bytes) -> str:
    """The member ``token`` of a form."""
    try:
        form = parse_qs(body.decode("ascii"), max_num_fields=8, strict_parsing=True)
    except ValueError:
        return ""
    token = form.get("token", [""])[0].strip()
    return token if len(token) <= MAX_TOKEN else ""
