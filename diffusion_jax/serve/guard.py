"""Checks of every request before all others: host name, origin, token, and how much a client may send at once."""

import asyncio
import base64
import collections
import hmac
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_jax.serve.bodies import error_answer
from diffusion_jax.serve.schema import Problem

COOKIE = "diffusion_token"
DRAINED = 16  # multiples of the allowed length that are read before the answer, so that the client sees it
PATIENCE = 60.0  # seconds in which the whole body of a request must arrive
SMALL = 65_536  # bytes of a body that are not counted in the limits below
HELD = 4  # multiples of the allowed length that the server keeps of all requests together; half of them of one client
OPEN = 256  # requests of one client at once
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def client_of(scope: Scope) -> str:
    """The address of the client of a request."""
    return scope["client"][0] if scope.get("client") else ""


class Guard:
    """Refuse what comes from elsewhere, without the token, or is too long.

    token: that a client must send as a bearer token, as the password of basic authentication, or in the cookie that
      opening /?token=TOKEN sets; "" for none.
    hosts: names of this server in the Host header, against pages that give a name of theirs the loopback address;
      empty for any.
    max_bytes: of a request's body.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: Iterable[str], max_bytes: int):
        self.app, self.token, self.hosts, self.max_bytes = app, token, set(hosts), max_bytes
        self.open = collections.Counter()  # requests, by client
        self.held = collections.Counter()  # bytes of their bodies, by client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        client, refusal = client_of(scope), self._refusal(scope)
        if refusal is None and self.open[client] >= OPEN:
            refusal = error_answer(scope["path"], Problem(429, f"a client may have {OPEN} requests at once", retry=5))
        self.open[client] += 1
        try:
            if scope["type"] == "http":
                await self._answer(refusal, scope, receive, send)
            elif refusal is None:
                await self.app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
        finally:
            self.open -= collections.Counter([client])  # also drops zeros

    async def _answer(self, refusal: Response | None, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer an HTTP request, with the refusal if there is one."""
        body = _Body(self, scope, receive)
        try:
            if refusal is None and body.length > self.max_bytes:
                await body.drain()
                refusal = error_answer(scope["path"], Problem(413, body.too_long))
        except Problem as error:
            refusal = error_answer(scope["path"], error)
        try:
            await (refusal or self.app)(scope, body.receive, _with_headers(send, body))
        finally:
            body.forget()

    def _refusal(self, scope: Scope) -> Response | None:
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _split(f"//{host}")
        if name is None:
            return error_answer(path, Problem(400, "the Host header is malformed"))
        if self.hosts and name.hostname not in self.hosts:
            reason = "this server has another name: open it as localhost or 127.0.0.1, add the name to "
            reason += "config.serve.hosts, or start it with config.serve.token_file, then it has any name"
            return error_answer(path, Problem(400, reason))
        site = _split(origin or "")
        if origin is not None and (site is None or site.netloc != host):
            return error_answer(path, Problem(403, "requests from pages of other sites are refused"))
        if not self.token or self._is_known(headers):
            return None
        if scope["type"] == "http" and path == "/" and self._matches(_token_in_address(scope)):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        if path == "/":
            return PlainTextResponse("This server needs its token: open the address that it printed.", 401)
        # the page tells what is wrong by itself, without the browser's window for a password
        asked = {} if "x-requested-with" in headers else {"www-authenticate": 'Basic realm="diffusion_jax"'}
        return error_answer(path, Problem(401, "the token is missing or wrong"), asked)

    def _is_known(self, headers: Headers) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value).decode().partition(":")[2]
            except ValueError:  # not base64, or not text
                return False
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE)  # also beside malformed ones of other programs
        return self._matches(value) or (cookie is not None and self._matches(cookie))

    def _matches(self, value: str) -> bool:
        return hmac.compare_digest(value.encode(), self.token.encode())


class _Body:
    """The body of a request while it arrives.

    length: bytes, as its head says; 0 if it does not.
    complete: whether nothing more of it is to come.
    """

    def __init__(self, guard: Guard, scope: Scope, receive: Receive):
        headers = Headers(scope=scope)
        length = headers.get("content-length", "0")
        self.guard, self.client, self._receive = guard, client_of(scope), receive
        self.length = int(length) if length.isdecimal() and len(length) < 20 else 0
        self.complete = not self.length and "transfer-encoding" not in headers
        self.received = self.counted = 0
        self.deadline = asyncio.get_running_loop().time() + PATIENCE
        self.too_long = f"a request may have {guard.max_bytes} bytes"

    async def receive(self) -> Message:
        """The next part. Raises Problem for a body that is too long, comes too slowly, or finds no room."""
        part = await self._next()
        if self.received > self.guard.max_bytes:
            await self.drain()
            raise Problem(413, self.too_long)
        held, room, more = self.guard.held, HELD * self.guard.max_bytes, self.received - SMALL - self.counted
        if more > 0:
            if held.total() + more > room or held[self.client] + more > room // 2:
                raise Problem(503, "the server has no room for this request now: send it again later", retry=5)
            held[self.client] += more
            self.counted += more
        return part

    async def drain(self) -> None:
        """Read on to the end and forget it, so that the client sees the answer."""
        while not self.complete and self.received < DRAINED * self.guard.max_bytes:
            await self._next()

    def forget(self) -> None:
        """The request is answered: make room for others."""
        self.guard.held -= collections.Counter({self.client: self.counted})

    async def _next(self) -> Message:
        try:
            async with asyncio.timeout_at(None if self.complete else self.deadline):
                part = await self._receive()
        except TimeoutError as error:
            raise Problem(408, f"the body of a request must arrive within {PATIENCE:g} seconds") from error
        self.received += len(part.get("body", b""))
        self.complete = self.complete or not part.get("more_body", False)
        return part


def _split(address: str) -> SplitResult | None:
    """The parts of an address, or None for a malformed one."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - it is only checked here
    except ValueError:
        return None
    return parts


def _token_in_address(scope: Scope) -> str:
    """The token in the address."""
    return QueryParams(scope["query_string"]).get("token", "")


def _with_headers(send: Send, body: _Body) -> Send:
    """`send` that adds HEADERS to every answer, and ends the connection after an answer to an unfinished body."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            if not body.complete:
                headers["connection"] = "close"
        await send(message)

    return sending
