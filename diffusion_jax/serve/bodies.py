"""The bodies of requests and answers."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response

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


def error_answer(path: str, error: Problem, headers: Mapping[str, str] | None = None) -> Response:
    """The answer that tells an error, in the form that clients of the path expect."""
    form = _web_ui_error if path.startswith("/sdapi/") else _openai_error
    retry = {"retry-after": str(error.retry)} if error.retry else {}
    return JSONResponse(form(error), error.status, {**retry, **(headers or {})})


def _openai_error(error: Problem) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.field or None, "code": None}}


def _web_ui_error(error: Problem) -> dict[str, Any]:
    """The form of AUTOMATIC1111's web UI. What is wrong with a field is told as FastAPI does."""
    detail: Any = error.message
    if error.status == HTTPStatus.UNPROCESSABLE_ENTITY:
        place = [int(part) if part.isdecimal() else part for part in error.field.split(".") if part]
        detail = [{"loc": ["body", *place], "msg": error.reason, "type": "value_error"}]
    return {"error": HTTPStatus(error.status).phrase, "detail": detail, "body": "", "errors": error.message}


def without_effect(values: Mapping[str, Any], neutral: Mapping[str, tuple | None]) -> list[str]:
    """The names of the values that would change a picture in another program, and have no effect here.

    neutral: name -> values that change no picture there; None for a name of which no value does.
    """

    def is_neutral(name: str, value: Any) -> bool:
        others = neutral.get(name, ())
        is_empty = value is False or value in (None, "", [], {}, -1)
        return others is None or is_empty or value in others

    return [name for name, value in values.items() if not is_neutral(name, value)]


def warning(name: str) -> str:
    """What is said of a field without effect."""
    return f"{name[:60]} has no effect on this server"


def event_text(name: str, values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(values)}\n\n"
