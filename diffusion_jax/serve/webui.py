"""The API of AUTOMATIC1111's web UI for its clients: /sdapi/v1/txt2img, img2img, and the lists that they read first."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffusion_jax.messages import as_json
from diffusion_jax.serve import uploads
from diffusion_jax.serve.bodies import json_object, warning
from diffusion_jax.serve.engine import CANCELLED, Ended, Job, PictureDone, Progress
from diffusion_jax.serve.guard import client_of
from diffusion_jax.serve.samplers import SAMPLERS, SCHEDULERS
from diffusion_jax.serve.schema import Problem, checked, png
from diffusion_jax.serve.service import Gone, QueuedRequest, Service, problem
from diffusion_jax.serve.webui_bodies import (
    ImageToImage,
    PictureInfo,
    TextToImage,
    ignored,
    ignored_options,
    images_of,
    values_and_notes,
)

FIELDS = {  # of `schema.Request` -> their names here
    "num_images": "batch_size",
    "guidance": "cfg_scale",
    "solver": "sampler_name",
    "spacing": "scheduler",
    "strength": "denoising_strength",
    "image": "init_images",
    "fit": "resize_mode",
}
LISTS = ("loras", "upscalers", "sd-vae", "hypernetworks", "latent-upscale-modes", "realesrgan-models")
LISTS += ("face-restorers", "prompt-styles", "sd-modules", "script-info")  # of which this server has none
ACTIONS = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings", "unload-checkpoint")
ACTIONS += ("reload-checkpoint",)  # there is one model, and it stays
OUR_TEXTS = {"prompt", "seed", "steps", "solver", "guidance", "width", "height"}  # of the pictures of this server


def routes(service: Service) -> list[Route]:
    """The routes of this API."""
    running: dict[Job, Progress] = {}
    title, facts, solver = service.facts.name, service.facts, service.sample.solver
    names = [SAMPLERS.get(name, name) for name in facts.solvers]
    samplers = [{"name": n, "aliases": [s], "options": {}} for n, s in zip(names, facts.solvers, strict=True)]
    schedulers = [{"name": name or "automatic", "label": SCHEDULERS.get(name, name)} for name in facts.spacings]
    schedulers = [names | {"aliases": None, "default_rho": -1, "need_inner_model": False} for names in schedulers]
    model = {"title": title, "model_name": title, "hash": None, "sha256": None, "filename": title, "config": None}
    settings = {"sd_model_checkpoint": title, "sd_checkpoint_hash": "", "samples_format": "png"}
    settings |= {"CLIP_stop_at_last_layers": 1, "sampler_name": SAMPLERS.get(solver, solver)}

    async def text_to_image(http: Http) -> Response:
        body = checked(TextToImage, await json_object(http), 422)
        return await _answer(service, client_of(http.scope), http.is_disconnected, running, body, {})

    async def image_to_image(http: Http) -> Response:
        body = checked(ImageToImage, await json_object(http), 422)
        images = await asyncio.to_thread(images_of, service, body)
        return await _answer(service, client_of(http.scope), http.is_disconnected, running, body, images)

    async def interrupt(http: Http) -> Response:
        for job in _of_client(running, http):
            service.engine.cancel(job)
        return JSONResponse({})

    async def progress(http: Http) -> Response:
        with_preview = http.query_params.get("skip_current_image", "").lower() not in ("true", "1")
        return JSONResponse(await asyncio.to_thread(_progress, _of_client(running, http), with_preview))

    async def picture_info(http: Http) -> Response:
        body = checked(PictureInfo, await json_object(http), 422)
        return JSONResponse(await asyncio.to_thread(_picture_info, body, service))

    async def set_options(http: Http) -> Response:
        changed = {name: value for name, value in (await json_object(http)).items() if settings.get(name) != value}
        return JSONResponse({"warnings": [warning(name) for name in ignored_options(changed, title)]})

    return [
        Route("/sdapi/v1/txt2img", text_to_image, methods=["POST"]),
        Route("/sdapi/v1/img2img", image_to_image, methods=["POST"]),
        Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
        Route("/sdapi/v1/skip", interrupt, methods=["POST"]),
        Route("/sdapi/v1/progress", progress),
        Route("/sdapi/v1/samplers", _always(samplers)),
        Route("/sdapi/v1/schedulers", _always(schedulers)),
        Route("/sdapi/v1/sd-models", _always([model])),
        Route("/sdapi/v1/options", _always(settings)),
        Route("/sdapi/v1/options", set_options, methods=["POST"]),
        Route("/sdapi/v1/png-info", picture_info, methods=["POST"]),
        Route("/sdapi/v1/memory", _memory),
        Route("/sdapi/v1/cmd-flags", _always({"api": True})),
        Route("/sdapi/v1/embeddings", _always(_embeddings(facts.words))),
        Route("/sdapi/v1/scripts", _always({"txt2img": [], "img2img": []})),
        *(Route(f"/sdapi/v1/{name}", _always([])) for name in LISTS),
        *(Route(f"/sdapi/v1/{name}", _always({}), methods=["POST"]) for name in ACTIONS),
    ]


def _embeddings(words: Mapping[str, int]) -> dict[str, Any]:
    """The learned words, as clients show them."""
    loaded = {word: {"step": None, "sd_checkpoint": None, "vectors": count} for word, count in words.items()}
    return {"loaded": loaded, "skipped": {}}


def _always(content: Any) -> Callable[[Http], Awaitable[Response]]:
    """The endpoint whose answer never changes."""

    async def answer(http: Http) -> Response:
        return JSONResponse(content)

    return answer


def _of_client(running: dict[Job, Progress], http: Http) -> dict[Job, Progress]:
    """Those of the jobs that the sender of a request has asked for."""
    client = client_of(http.scope)
    return {job: step for job, step in running.items() if job.client == client}


async def _memory(http: Http) -> Response:
    """The memory of the machine, bytes. Where the system does not say how much of it is free, 0."""
    names = ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
    pages = (os.sysconf(name) if name in os.sysconf_names else 0 for name in names)
    total, free = (os.sysconf("SC_PAGE_SIZE") * count for count in pages)
    ram = {"free": free, "used": total - free, "total": total}
    return JSONResponse({"ram": ram, "cuda": {"error": "unavailable"}})


def _picture_info(body: PictureInfo, service: Service) -> dict[str, Any]:
    """The settings in the texts of a PNG."""
    try:
        items = uploads.texts(uploads.from_base64(body.image), service.limits.max_pixels)
    except ValueError as error:
        raise Problem(422, str(error), "image") from error
    info = items.get("parameters") or (_infotext(items, items["seed"]) if items.keys() >= OUR_TEXTS else "")
    return {"info": info, "items": items, "parameters": {}}


def _progress(running: dict[Job, Progress], with_preview: bool) -> dict[str, Any]:
    """How far the first of the running jobs is."""
    job, step = next(iter(running.items()), (None, Progress(0, 1, {})))
    done_part = (1 - job.left / len(job.pictures)) if job else 0.0
    part = min(done_part + step.done / step.total / len(job.pictures), 1.0) if job else 0.0
    state = {"skipped": False, "interrupted": False, "job": "txt2img" if job else "", "job_count": len(running)}
    state |= {"job_no": 0, "job_timestamp": "0", "sampling_step": step.done, "sampling_steps": step.total * bool(job)}
    preview = png(step.previews[min(step.previews)], {}) if step.previews and with_preview else None
    return {"progress": part, "eta_relative": 0.0, "state": state, "current_image": preview, "textinfo": None}


def _named(error: Problem) -> Problem:
    """The error with the names and the status of this API."""
    return Problem(
        422 if error.status == 400 else error.status, error.reason, FIELDS.get(error.field, error.field), error.retry
    )


async def _answer(
    service: Service,
    client: str,
    gone: Gone,
    running: dict[Job, Progress],
    body: TextToImage,
    images: dict[str, Any],
) -> Response:
    """The answer with the pictures. After an interrupt, the last preview stands for a picture that is not done."""
    values, notes = values_and_notes(service, body, images)
    try:
        queued = await service.ask(client, values)
    except Problem as error:
        raise _named(error) from error
    job, finished, previews = queued.job, {}, {}
    running[job] = Progress(0, 1, {})
    try:
        async for event in service.follow(gone, queued):
            match event:
                case Progress():
                    previews |= event.previews
                    running[job] = event._replace(previews=dict(previews))
                case PictureDone(number=number):
                    finished[number] = await service.png(queued, event)
                case Ended(error=error) if error and error != CANCELLED:
                    raise _named(problem(error))
    finally:
        del running[job]
    for number in previews.keys() - finished.keys():
        finished[number] = await asyncio.to_thread(png, previews[number], {})
    pictures = [finished[number] for number in sorted(finished)]
    warnings = notes + queued.notes + ignored(body, service.facts.name)
    info = _info(service, queued, body, warnings)
    parameters = {name: getattr(body, name) for name in type(body).model_fields if name not in ("mask", "init_images")}
    content = {"images": pictures if body.send_images else [], "parameters": json.loads(as_json(parameters))}
    return JSONResponse(content | {"info": json.dumps(info)})


def _infotext(texts: Mapping[str, str], seed: int | str) -> str:
    """The settings of a picture, as web UIs write them."""
    negative = f"\nNegative prompt: {texts['negative_prompt']}" if texts.get("negative_prompt") else ""
    about = {
        "Steps": texts["steps"],
        "Sampler": SAMPLERS.get(texts["solver"], texts["solver"]),
        "Schedule type": SCHEDULERS.get(texts.get("spacing", ""), texts.get("spacing", "")),
        "CFG scale": texts["guidance"],
        "Seed": seed,
        "Size": f"{texts['width']}x{texts['height']}",
    }
    if texts.get("drawn"):
        about["Drawn at"] = texts["drawn"]
    return f"{texts['prompt']}{negative}\n" + ", ".join(f"{name}: {value}" for name, value in about.items())


def _info(service: Service, queued: QueuedRequest, body: TextToImage, warnings: list[str]) -> dict[str, Any]:
    request, job = queued.request, queued.job
    seeds = [picture.seed for picture in job.pictures]
    texts = service.texts(queued, 0)
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": request.width,
        "height": request.height,
        "sampler_name": SAMPLERS.get(request.solver, request.solver),
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": body.batch_size,
        "extra_generation_params": {"Drawn at": texts["drawn"]} if "drawn" in texts else {},
        "infotexts": [_infotext(texts, seed) for seed in seeds],
        "warnings": warnings,
    }
