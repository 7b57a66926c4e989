"""The bodies of requests and answers."""

import json
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.requests import Request as Http

from diffusion_jax.serve.schema import Problem


async def json_object(http: Http) -> dict[str, Any]:
    """The JSON object of a request. Raises Problem for anything else."""
    try:
        return parsed(await http.body(), "the body")
    except ClientDisconnect as error:
        raise Problem(400, "the client left") from error


def parsed(text: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object in a text. Raises Problem, calling it by this name, for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"{name} must be a JSON object") from error
    if not isinstance(values, dict):
        raise Problem(400, f"{name} must be a JSON object")
    return values


def event_text(name: str, values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"
