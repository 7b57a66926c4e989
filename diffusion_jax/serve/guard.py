"""Checks of every request before all others: host name, origin, token and length."""

import base64
import binascii
import hmac
from collections.abc import Iterable
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_jax.serve.schema import Problem

COOKIE = "diffusion_token"
DRAINED = 16  # multiples of the allowed length that are read before the answer, so that the client sees it
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; connect-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and scope["type"] == "http":
            await self._limited(scope, receive, _with_headers(send))
        elif refusal is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await refusal(scope, receive, _with_headers(send))
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.hosts and urlsplit(f"//{host}").hostname not in self.hosts:
            return _error(400, "this server has another name: open it as localhost or 127.0.0.1")
        if origin is not None and urlsplit(origin).netloc != host:
            return _error(403, "requests from pages of other sites are refused")
        if not self.token or self._is_known(headers):
            return None
        if scope["type"] == "http" and scope["path"] == "/" and self._matches(_token_in_address(scope)):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        if scope["path"] == "/":
            return PlainTextResponse("This server needs its token: open the address that it printed.", 401)
        return _error(401, "the token is missing or wrong", {"www-authenticate": 'Basic realm="diffusion_jax"'})

    def _is_known(self, headers: Headers) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                value = base64.b64decode(value).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        return self._matches(value) or (cookie is not None and self._matches(cookie.value))

    def _matches(self, value: str) -> bool:
        return hmac.compare_digest(value.encode(), self.token.encode())

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a body of at most max_bytes. A longer one is read to its end and forgotten, so that
        the client sees the answer.
        """
        length, received = Headers(scope=scope).get("content-length", "0"), 0
        message = f"a request may have {self.max_bytes} bytes"

        async def limited_receive() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.max_bytes:
                await self._drain(receive, part)
                raise Problem(413, message)
            return part

        if length.isdecimal() and int(length) > self.max_bytes:
            await self._drain(receive, await receive())
            await _error(413, message)(scope, receive, send)
        else:
            await self.app(scope, limited_receive, send)

    async def _drain(self, receive: Receive, part: Message) -> None:
        """Read on to the end of a body. part: of it that was read last."""
        received = 0
        while part.get("more_body", False) and received < DRAINED * self.max_bytes:
            part = await receive()
            received += len(part.get("body", b""))


def _token_in_address(scope: Scope) -> str:
    """The token in the address."""
    return QueryParams(scope["query_string"]).get("token", "")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "refused", "param": None}}, status, headers)


def _with_headers(send: Send) -> Send:
    """`send` that adds HEADERS to every answer."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sending
