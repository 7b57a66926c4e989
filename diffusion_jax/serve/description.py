"""The OpenAPI description of the server."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from diffusion_jax.serve.openai import Edit, Generation
from diffusion_jax.serve.schema import Request
from diffusion_jax.serve.webui import ACTIONS, LISTS
from diffusion_jax.serve.webui_bodies import ImageToImage, Options, PictureInfo, TextToImage

TEMPLATE = "#/components/schemas/{model}"
NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
EVENTS = "Server-sent events: queued, preparing, progress, picture, animation, done, error."
READ = {  # what can be read -> what it is
    "/api/model": "The model: its size, solvers and noise schedule.",
    "/health": "Whether the server draws: 200 if so, else 503.",
    "/metrics": "Figures for Prometheus.",
    "/v1/models": "The model, as OpenAI's API lists it.",
    "/sdapi/v1/samplers": "The solvers, by their names in web UIs.",
    "/sdapi/v1/schedulers": "The spacings of steps.",
    "/sdapi/v1/sd-models": "The model, as web UIs list it.",
    "/sdapi/v1/options": "The options of a web UI.",
    "/sdapi/v1/progress": "How far the request of this client is.",
    "/sdapi/v1/memory": "The memory of the machine.",
    "/sdapi/v1/cmd-flags": "The flags that a web UI was started with.",
    "/sdapi/v1/embeddings": "The learned words, as web UIs list them: none.",
    "/sdapi/v1/scripts": "The scripts of web UIs: none.",
    **{f"/sdapi/v1/{name}": "A list of web UIs that is empty here." for name in LISTS},
}
ACT = {  # what can be posted without a body -> what it does
    "/sdapi/v1/interrupt": "Stop this client's requests of web UIs.",
    "/sdapi/v1/skip": "Stop this client's requests of web UIs.",
    **{f"/sdapi/v1/{name}": "Nothing: there is one model, and it stays." for name in ACTIONS},
}


def openapi(request: type[Request], live: type[Request]) -> dict[str, Any]:
    """The description, version 3.1.

    request, live: `schema.of_model`, for pictures and for frames of the live canvas.
    """
    kinds = (request, live, Generation, Edit, TextToImage, ImageToImage, PictureInfo, Options)
    _, schemas = models_json_schema([(kind, "validation") for kind in kinds], ref_template=TEMPLATE)
    paths = {path: _read(about) for path, about in READ.items()}
    paths |= {
        "/api/generate": _post("Draw pictures.", request, answer="text/event-stream", about=EVENTS),
        "/v1/images/generations": _post("Draw pictures, as OpenAI's API does.", Generation),
        "/v1/images/edits": _edit(),
        "/sdapi/v1/png-info": _post("Read the settings in a PNG.", PictureInfo),
        "/sdapi/v1/txt2img": _post("Draw pictures, as web UIs do.", TextToImage),
        "/sdapi/v1/img2img": _post("Change a picture, as web UIs do.", ImageToImage),
        "/v1/models/{name}": {"parameters": [NAME], **_read("The model, if it has this name.")},
    }
    paths |= {path: {"post": {"summary": about, "responses": _responses()}} for path, about in ACT.items()}
    paths["/sdapi/v1/options"] |= _post("Say which options of a web UI have no effect here.", Options)
    return {
        "openapi": "3.1.0",
        "info": {"title": "diffusion_jax", "version": "1", "description": "Pictures from a diffusion model."},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _read(about: str) -> dict[str, Any]:
    return {"get": {"summary": about, "responses": _responses()}}


def _responses(media: str = "application/json", about: str = "Done.") -> dict[str, Any]:
    errors = {
        "400": "The request is wrong; the message says what.",
        "408": "The request did not arrive in time.",
        "413": "The request is too long.",
        "422": "The request is wrong; the message says what.",
        "429": "The queue is full; Retry-After says when to come back.",
        "500": "The picture could not be drawn.",
        "503": "The server has no room for the request now.",
    }
    return {"200": {"description": about, "content": {media: {}}}} | {
        status: {"description": text} for status, text in errors.items()
    }


def _post(
    summary: str, kind: type[BaseModel], answer: str = "application/json", about: str = "Done."
) -> dict[str, Any]:
    schema = {"$ref": TEMPLATE.format(model=kind.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _responses(answer, about)}}


def _edit() -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    files = {"type": "object", "properties": {"image": file, "mask": file}, "required": ["image"]}
    schema = {"allOf": [{"$ref": TEMPLATE.format(model="Edit")}, files]}
    body = {"required": True, "content": {"multipart/form-data": {"schema": schema}}}
    return {
        "post": {"summary": "Change a picture, as OpenAI's API does.", "requestBody": body, "responses": _responses()}
    }
