"""The images API that clients of OpenAI's speak: generations, edits and models.

Fields of `schema.Request` that this API lacks, such as steps or seed, may be sent too.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from time import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from diffusion_jax.serve import sizes, uploads
from diffusion_jax.serve.bodies import event_text, json_object, value_of, warning, without_effect
from diffusion_jax.serve.engine import Ended, PictureDone, Progress
from diffusion_jax.serve.guard import client_of
from diffusion_jax.serve.schema import Problem, checked, png
from diffusion_jax.serve.service import QueuedRequest, Service, problem

NUMBERS = ("steps", "guidance", "strength", "seed")
EXTRA_FIELDS = ("negative_prompt", "solver", "spacing", *NUMBERS)  # of `schema.Request`, that OpenAI's API lacks
# fields of `schema.Request` -> their names here
FIELDS = {"num_images": "n", "width": "size", "height": "size", "references": "image"}
WITHOUT_EFFECT = {  # other fields of OpenAI's API -> values that change no picture there; None: no value does
    **dict.fromkeys(("user", "safety_identifier"), None),
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "moderation": ("auto",),
    "output_compression": (100,),
    "input_fidelity": ("low",),
}
FILES = 17  # of a form: 16 images and a mask


class Generation(BaseModel):
    """POST /v1/images/generations. `warnings` of the answer name other fields of the API, which have no effect."""

    model_config = ConfigDict(extra="allow")

    prompt: Annotated[str, Field(description="What to draw.")]
    model: str | None = Field(None, description="Any name: this server has one model.")
    n: int | None = Field(1, ge=1, description="How many pictures.")
    size: str | None = Field("auto", description="WIDTHxHEIGHT in pixels, or auto.")
    response_format: Literal["b64_json"] | None = Field("b64_json", description="Pictures are never stored for a url.")
    output_format: Literal["png"] | None = "png"
    stream: bool | None = Field(False, description="Answer as server-sent events.")
    partial_images: int | None = Field(0, ge=0, le=3, description="stream: how many previews to send.")


class Edit(Generation):
    """POST /v1/images/edits, as a form. image: what to change. mask: transparent where it is changed.

    Without a mask and a strength, a model that reads reference pictures gets all images as such.
    """


def routes(service: Service) -> list[Route]:
    """The routes of this API."""
    card = {"id": service.facts.name, "object": "model", "created": int(time()), "owned_by": "diffusion_jax"}

    async def generations(http: Http) -> Response:
        return await _answer(service, http, "image_generation", checked(Generation, await json_object(http)), {}, [])

    async def edits(http: Http) -> Response:
        if http.headers.get("content-type", "").startswith("application/json"):
            raise Problem(400, "expected a form, multipart/form-data, with the pictures as files")
        async with http.form(max_files=FILES, max_part_size=service.limits.max_upload) as form:
            body = checked(Edit, {name: _number(name, v) for name, v in form.items() if isinstance(v, str)})
            images, unused = await _images(service, form)
        return await _answer(service, http, "image_edit", body, images, unused)

    async def models(http: Http) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def model(http: Http) -> Response:
        if http.path_params["name"] != card["id"]:
            raise Problem(404, f"this server has one model, {card['id']}", "model")
        return JSONResponse(card)

    return [
        Route("/v1/images/generations", generations, methods=["POST"]),
        Route("/v1/images/edits", edits, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]


def _number(name: str, value: str) -> Any:
    """The value of a form's field; that of a number of ours as JSON."""
    try:
        return value_of(value) if name in NUMBERS else value
    except ValueError:
        return value


async def _images(service: Service, form: FormData) -> tuple[dict[str, Any], list[str]]:
    """The pictures of a form in base64, as fields of `schema.Request`, and the names of files that are not used.

    Of several images it is the first: the mask is of that one. Without a mask, the transparent part of the image is the
    mask. If there is none, all images are reference pictures, unless the form has a strength or the model reads none.
    Browsers send an empty file without a name for one that nobody has chosen.
    """
    files: dict[str, list[UploadFile]] = {"image": [], "mask": []}
    unused = []
    for name, file in form.multi_items():
        if isinstance(file, UploadFile) and (file.filename or file.size):
            name = name.removesuffix("[]")
            if name in files:
                files[name].append(file)
            else:
                unused.append(name)
    if not files["image"]:
        raise Problem(400, "a file is needed", "image")
    images = [await file.read() for file in files["image"]]
    field = "mask" if files["mask"] else "image"
    marked = await files["mask"][0].read() if files["mask"] else images[0]
    try:
        mask = await asyncio.to_thread(uploads.mask_of_transparency, marked, service.limits.max_pixels)
    except ValueError as error:
        raise Problem(400, str(error), field) from error
    if mask is None and field == "mask":
        raise Problem(400, "expected transparency where the image is edited, got none", "mask")
    encoded = [base64.b64encode(data).decode() for data in images]
    if mask is None and service.facts.references and "strength" not in form:
        return {"references": encoded}, unused
    unused += [name for name, given in files.items() for _ in given[1:]]
    return {"image": encoded[0]} | ({"mask": base64.b64encode(mask).decode()} if mask else {}), unused


def _values(body: Generation, images: dict[str, Any]) -> dict[str, Any]:
    """The request in fields of `schema.Request`."""
    extra = body.model_extra or {}
    values = {
        "prompt": body.prompt,
        "num_images": body.n or 1,
        "previews": "some" if body.partial_images else "none",
    }
    values |= {name: extra[name] for name in EXTRA_FIELDS if extra.get(name) is not None} | images
    if isinstance(extra.get("seed"), int) and extra["seed"] < 0:  # as other programs say: a new one
        del values["seed"]
    if body.size and body.size != "auto":
        try:
            values["height"], values["width"] = sizes.parsed(body.size)
        except ValueError as error:
            raise Problem(400, f"{error} (or auto)", "size") from error
    return values


def _ignored(body: Generation) -> list[str]:
    """The names of fields of a request that have no effect here but would change the picture there."""
    extra = {name: value for name, value in (body.model_extra or {}).items() if name not in EXTRA_FIELDS}
    return without_effect(extra, WITHOUT_EFFECT)


async def _answer(
    service: Service, http: Http, event: str, body: Generation, images: dict[str, Any], unused: list[str]
) -> Response:
    """The answer with the pictures. unused: names of files of the request that are not used."""
    try:
        queued = await service.ask(client_of(http.scope), _values(body, images))
    except Problem as error:
        raise Problem(error.status, error.reason, FIELDS.get(error.field, error.field), error.retry) from error
    about = _about(queued, [warning(name) for name in [*unused, *_ignored(body)]])
    if body.stream:
        return StreamingResponse(_events(service, http, event, body, queued, about), media_type="text/event-stream")
    pictures = await service.pictures(http.is_disconnected, queued)
    return JSONResponse({"created": int(time()), "data": [{"b64_json": picture} for picture in pictures]} | about)


def _about(queued: QueuedRequest, warnings: list[str]) -> dict[str, Any]:
    """What the API says of each answer: no part of a picture is counted in tokens here. `warnings` are ours."""
    usage = {"total_tokens": 0, "input_tokens": 0, "output_tokens": 0}
    usage["input_tokens_details"] = {"text_tokens": 0, "image_tokens": 0}
    size = sizes.written((queued.request.height, queued.request.width))
    about = {"size": size, "quality": "auto", "background": "opaque", "output_format": "png"}
    return about | {"usage": usage, "warnings": queued.notes + warnings}


async def _events(
    service: Service, http: Http, event: str, body: Generation, queued: QueuedRequest, about: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer as server-sent events: up to partial_images previews, then the pictures. about: in each event."""
    about, previews_sent = {"created_at": int(time())} | about, 0
    async for update in service.follow(http.is_disconnected, queued):
        match update:
            case Progress(previews=previews) if previews and previews_sent < (body.partial_images or 0):
                image = await asyncio.to_thread(png, previews[min(previews)], {})
                yield _named_event(
                    f"{event}.partial_image", {"b64_json": image, "partial_image_index": previews_sent} | about
                )
                previews_sent += 1
            case PictureDone():
                yield _named_event(f"{event}.completed", {"b64_json": await service.png(queued, update)} | about)
            case Ended(error=error) if error:
                failure = problem(error)
                yield _named_event("error", {"error": {"message": failure.message, "code": str(failure.status)}})


def _named_event(name: str, values: dict[str, Any]) -> str:
    """An event that also has its name inside, as this API's do."""
    return event_text(name, {"type": name} | values)
