"""Limits who may see the pages and what a page may do, because pages show texts that a model wrote."""

import hashlib
import hmac
from collections.abc import Awaitable, Callable
from urllib.parse import urlencode, urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cat_grpo.errors import BadInput

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    # Tells other hosts nothing. With no-referrer a browser would not say that a form comes from our page.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
COOKIE = "cat_grpo_inspector"
SCRIPT_HEADER = "x-cat-grpo"
"""Our own script sends this header. A form on another site cannot set one."""

Next = Callable[[Request], Awaitable[Response]]


def secure(app: FastAPI, token: str | None) -> None:
    """Adds HEADERS to every answer. With a token pages ask for it; without one they answer only to
    loopback names.

    Otherwise another site could point its own name here and read what this machine can read.
    """
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    else:
        app.middleware("http")(_ask_for(token))
    app.middleware("http")(_add_headers)


def refuse_open_host(host: str, token: str | None) -> None:
    """Raises BadInput when others can reach the address and no token keeps them out."""
    if host not in LOOPBACK and not token:
        raise BadInput(f"--host {host}: others can reach it, so it needs a --token")


def is_own_page(request: Request) -> bool:
    """Whether the browser says that one of our own pages sent this."""
    origin = request.headers.get("origin")
    return origin is not None and urlsplit(origin).netloc == request.headers.get("host")


async def _add_headers(request: Request, call_next: Next) -> Response:
    response = await call_next(request)
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _ask_for(token: str) -> Callable[[Request, Next], Awaitable[Response]]:
    proof = hashlib.sha256(f"cat-grpo inspect {token}".encode()).hexdigest()

    async def let_in(request: Request, call_next: Next) -> Response:
        shown = request.query_params.get("token")
        if shown is not None and request.method == "GET" and _same(shown, token):
            response = RedirectResponse(_without_token(request), status_code=303)
            is_https = request.url.scheme == "https"
            response.set_cookie(COOKIE, proof, httponly=True, samesite="strict", secure=is_https)
            return response
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if _same(request.cookies.get(COOKIE, ""), proof) or (
            scheme.lower() == "bearer" and _same(bearer, token)
        ):
            return await call_next(request)
        if request.url.path.startswith("/static/"):  # no secret, and the page below needs it
            return await call_next(request)
        return HTMLResponse(_DOOR, status_code=401, headers={"WWW-Authenticate": "Bearer"})

    return let_in


def _same(shown: str, known: str) -> bool:
    """Whether both are equal. The time that this takes does not tell how much of them is equal."""
    return hmac.compare_digest(shown.encode(), known.encode())


def _without_token(request: Request) -> str:
    """The same address without the token, so that no history keeps the token.

    It starts with one slash, because two would name another host.
    """
    query = urlencode([pair for pair in request.query_params.multi_items() if pair[0] != "token"])
    path = "/" + request.scope.get("raw_path", b"/").decode("ascii").lstrip("/")
    return f"{path}?{query}" if query else path


_DOOR = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Inspector</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/static/inspector.css"></head>
<body><main class="door"><h1>Inspector</h1><p>Enter the token that the inspector was started with.</p>
<form method="get"><label for="token">Token</label>
<input id="token" name="token" type="password" autocomplete="current-password" autofocus required>
<button>Open</button></form></main></body></html>"""
