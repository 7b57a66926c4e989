"""The bodies of requests and answers."""

import json
from typing import Any

from starlette.requests import Request as Http

from diffusion_jax.serve.schema import Problem


async def json_object(http: Http) -> dict[str, Any]:
    """The JSON object of a request. Raises Problem for anything else."""
    return parsed(await http.body(), "the body")


def value_of(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for anything else, also for one that is nested too deeply or has half
    of a surrogate pair, which no answer can give back."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def parsed(text: str | bytes, name: str) -> dict[str, Any]:
    """The JSON object in a text. Raises Problem, calling it by this name, for anything else."""
    try:
        values = value_of(text)
    except ValueError as error:
        raise Problem(400, f"{name} must be a JSON object") from error
    if not isinstance(values, dict):
        raise Problem(400, f"{name} must be a JSON object")
    return values


def event_text(name: str, values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"
