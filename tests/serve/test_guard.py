"""What a client may send at once, and what is checked before anything else: without a model."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from ml_collections import ConfigDict
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from diffusion_jax import serve
from diffusion_jax.serve import connections, guard
from diffusion_jax.serve.guard import Guard
from diffusion_jax.serve.schema import Problem

MAX_BYTES = 200_000


async def length_of_body(http):
    return PlainTextResponse(str(len(await http.body())))


async def fail(http):
    raise ZeroDivisionError


def guarded(token="", hosts=()):
    async def refuse(http, problem):
        return PlainTextResponse(problem.message, problem.status)

    async def report(http, error):
        return PlainTextResponse("failed", 500)

    routes = [Route("/", length_of_body, methods=["GET", "POST"]), Route("/fail", fail)]
    app = Starlette(routes=routes, exception_handlers={Problem: refuse, Exception: report})
    return Guard(app, token, hosts, MAX_BYTES)


def ask(app, body=b"", headers=(), method="POST", path="/", query=b"", client="127.0.0.1"):
    """(status, headers, body) of the answer to a request. body: its parts; None is one that never comes."""
    parts = [body] if isinstance(body, bytes) else list(body)
    fields = {"host": "localhost:80", "content-length": str(sum(len(part or b"x") for part in parts))} | dict(headers)
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query, "client": (client, 1), "root_path": "",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in fields.items()], "scheme": "http",
        "http_version": "1.1", "server": ("localhost", 80),
    }  # fmt: skip
    sent = []

    async def receive():
        part = parts.pop(0)
        if part is None:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    async def answer():
        with contextlib.suppress(ZeroDivisionError):
            await app(scope, receive, send)
        return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, sent[1].get("body", b"")

    return answer()


def asked(*args, **options):
    return asyncio.run(ask(*args, **options))


@pytest.mark.parametrize("other", ['prefs={"dark": true}', "a b=1", "[x]=1", "x", "a=\xe9"])
def test_the_token_is_found_beside_cookies_of_other_programs(other):
    app = guarded(token="secret")
    for cookie in (f"{other}; {guard.COOKIE}=secret", f"{guard.COOKIE}=secret; {other}"):
        assert asked(app, headers={"cookie": cookie})[0] == 200
    assert asked(app, headers={"cookie": f"{other}; {guard.COOKIE}=wrong"})[0] == 401


@pytest.mark.parametrize("origin", ["http://[", "http://localhost:99999999", "http://]", "//[x", "null", "http://[::1"])
def test_a_malformed_origin_is_another_site(origin):
    for app in (guarded(), guarded("secret"), guarded(hosts=("localhost",))):
        status, headers, body = asked(app, headers={"origin": origin})
        assert status == 403 and b"other sites" in body and headers["cross-origin-resource-policy"] == "same-origin"


@pytest.mark.parametrize("host", ["[", "localhost:99999999", "[::1", "a]"])
def test_a_malformed_host_is_refused(host):
    for app in (guarded(), guarded("secret"), guarded(hosts=("localhost",))):
        status, _, body = asked(app, headers={"host": host})
        assert status == 400 and b"Host" in body


@pytest.mark.parametrize("value", ["Basic \xff\xff", "Basic /w==", "Basic a", "Bearer \xff", "\xff", ""])
def test_a_malformed_authorization_is_a_wrong_token(value):
    assert asked(guarded("secret"), headers={"authorization": value})[0] == 401


def test_errors_have_the_form_that_clients_of_the_path_expect():
    """AUTOMATIC1111's web UI: error, detail, body and errors; its detail is a list for what is wrong in a request."""
    for headers, status in ({"host": "evil.example"}, 400), ({"origin": "http://evil.example"}, 403), ({}, 401):
        app = guarded("" if status == 400 else "secret", ("localhost",))
        openai, web_ui = (
            json.loads(asked(app, headers=headers, path=path)[2]) for path in ("/v1/models", "/sdapi/v1/txt2img")
        )
        assert openai["error"]["type"] == "invalid_request_error" and openai["error"]["param"] is None
        assert web_ui.keys() == {"error", "detail", "body", "errors"} and web_ui["detail"] == openai["error"]["message"]
    for path in ("/v1/x", "/sdapi/v1/x"):
        status, headers, body = asked(guarded(), [b"x" * MAX_BYTES, b"x"], path=path)
        assert status == 413 and ("detail" in json.loads(body)) == path.startswith("/sdapi")


def test_a_host_has_the_names_that_it_is_given():
    app = guarded(hosts=("localhost", "host.docker.internal"))
    for host in ("host.docker.internal", "Host.Docker.Internal:7860", "localhost"):
        assert asked(app, headers={"host": host})[0] == 200
    status, _, body = asked(app, headers={"host": "host.docker.internal.evil.example"})
    assert status == 400 and b"config.serve.hosts" in body
    config = ConfigDict({"host": "127.0.0.1", "hosts": ("Host.Docker.Internal",)})
    assert serve._names(config) == ("localhost", "127.0.0.1", "::1", "127.0.0.1", "host.docker.internal")


def test_every_answer_says_that_only_this_server_s_pages_may_use_it():
    for path in ("/", "/fail", "/none"):
        _, headers, _ = asked(guarded(), method="GET", path=path)
        assert (
            headers["cross-origin-resource-policy"] == "same-origin"
            and "default-src" in headers["content-security-policy"]
        )


@pytest.mark.parametrize("token", ["a+b", "a&b=c", "a%41b", "a#b?c/d", 'a b"c;d,e\\'])
def test_the_printed_address_opens_the_page_with_any_token(token):
    address = serve._address("::1", 80, token)
    parts = urlsplit(address)
    assert (parts.hostname, parts.port, parts.path) == ("::1", 80, "/")
    app = guarded(token)
    status, headers, _ = asked(app, method="GET", query=parts.query.encode())
    assert status == 303
    cookie = headers["set-cookie"].partition("; HttpOnly")[0]
    assert asked(app, method="GET", headers={"cookie": cookie})[0] == 200


def test_a_body_must_arrive_in_time(monkeypatch):
    monkeypatch.setattr(guard, "PATIENCE", 0.1)
    status, headers, body = asked(guarded(), [b"begun", None])
    assert status == 408 and b"within 0.1 seconds" in body and headers["connection"] == "close"
    assert "connection" not in asked(guarded(), [b"be", b"gun"])[1]


def test_unfinished_bodies_have_a_limit_together_and_for_each_client():
    app = guarded()

    async def many():
        first, second = "10.0.0.1", "10.0.0.2"
        parts = [b"x" * 100_000, b"x" * 90_000, None]
        unfinished = [asyncio.create_task(ask(app, parts, client=first)) for _ in range(30)]
        await asyncio.sleep(0.2)
        refused = [task.result() for task in unfinished if task.done()]
        held = app.held.total()
        small, large = await ask(app, b"x" * 50_000, client=first), await ask(app, b"x" * 190_000, client=second)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        return refused, held, small, large

    refused, held, small, large = asyncio.run(many())
    assert {status for status, *_ in refused} == {503} and len(refused) >= 26
    assert held <= guard.HELD * MAX_BYTES // 2, "one client has half of the room"
    assert (small[0], small[2]) == (200, b"50000"), "small ones are not counted"
    assert (large[0], large[2]) == (200, b"190000"), "another client has its own half"
    assert not app.held and not app.open, "nothing is kept"


def test_requests_of_one_client_at_once_have_a_limit(monkeypatch):
    monkeypatch.setattr(guard, "OPEN", 3)
    app = guarded()

    async def many():
        waiting = [asyncio.create_task(ask(app, [b"x", None], client="10.0.0.1")) for _ in range(3)]
        await asyncio.sleep(0.05)
        answers = await ask(app, client="10.0.0.1"), await ask(app, client="10.0.0.2")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return answers

    mine, other = asyncio.run(many())
    assert mine[0] == 429 and int(mine[1]["retry-after"]) and other[0] == 200


@contextlib.contextmanager
def listening():
    """The port of a server."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(connections.settings(guarded(), (8, 8), MAX_BYTES, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def until_closed(port, *parts, pause=0.15, source="127.0.0.1"):
    """Seconds until the server closes a connection on which these parts come, one after each pause."""
    with socket.create_connection(("127.0.0.1", port), source_address=(source, 0)) as client:
        start = time.monotonic()
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        client.settimeout(20)
        with contextlib.suppress(ConnectionError):
            while client.recv(65_536):
                pass
        return time.monotonic() - start


def test_a_connection_without_a_request_is_closed(monkeypatch):
    monkeypatch.setattr(connections, "HEAD", 0.3)
    with listening() as port:
        assert until_closed(port) < 3
        assert until_closed(port, b"GET / HT", b"TP/1.1\r\n") < 3
        full = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert until_closed(port, full, b"GET") < 3, "also one that has had a request"
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(3):
                assert client.get("/").text == "0"
                time.sleep(0.2)


def test_connections_have_a_limit_together_and_for_each_client(monkeypatch):
    monkeypatch.setattr(connections, "CONNECTIONS", 4)
    with listening() as port, contextlib.ExitStack() as stack:

        def connect(source):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), source_address=(source, 0)))
            time.sleep(0.1)

        connect("127.0.0.1")
        connect("127.0.0.1")
        assert until_closed(port) < 3, "one client has half of them"
        with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as other:
            assert other.get(f"http://127.0.0.1:{port}").text == "0", "another one has its own"
        connect("127.0.0.2")
        connect("127.0.0.2")
        assert until_closed(port, source="127.0.0.3") < 3, "all are in use"


@pytest.mark.parametrize(("files", "most"), [(1024, 768), (256, 192), (100_000, 1024), (-1, 1024)])
def test_connections_leave_files_for_the_rest_of_the_process(monkeypatch, files, most):
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (files, files))
    assert connections.most_connections() == most
