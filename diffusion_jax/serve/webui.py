"""The API of AUTOMATIC1111's web UI for its clients: /sdapi/v1/txt2img, img2img, and the lists that they read first."""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffusion_jax.serve import uploads
from diffusion_jax.serve.bodies import json_object
from diffusion_jax.serve.engine import CANCELLED, Ended, Job, PictureDone, Progress
from diffusion_jax.serve.schema import Problem, Request, checked, png
from diffusion_jax.serve.service import Service, problem

SAMPLERS = {  # solver -> its name in the web UI
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "plms": "PLMS",
    "consistency": "LCM",
}
SCHEDULERS = {
    "": "Automatic",
    "karras": "Karras",
    "trailing": "SGM Uniform",
    "leading": "Normal",
}  # spacing -> its name there


class TextToImage(BaseModel):
    """POST /sdapi/v1/txt2img. Other fields of the API are accepted and have no effect."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, ge=-1, description="-1 for a new one.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    sampler_name: str | None = Field(None, description="A name of /sdapi/v1/samplers.")
    sampler_index: str | None = None
    scheduler: str | None = Field(None, description="A name of /sdapi/v1/schedulers.")
    send_images: bool = True


class ImageToImage(TextToImage):
    """POST /sdapi/v1/img2img. The image is resized to cover the size, and cropped."""

    init_images: list[str] = Field(min_length=1, description="Pictures in base64; the first is used.")
    mask: str | None = Field(None, description="Its light parts are drawn anew, or its opaque ones.")
    inpainting_mask_invert: Literal[0, 1] = 0
    denoising_strength: float | None = None


def routes(service: Service) -> list[Route]:
    """The routes of this API."""
    running: dict[Job, Progress] = {}
    title, facts, solver = service.facts.name, service.facts, service.sample.solver
    samplers = [{"name": SAMPLERS.get(name, name), "aliases": [name], "options": {}} for name in facts.solvers]
    schedulers = [{"name": name or "automatic", "label": SCHEDULERS.get(name, name)} for name in facts.spacings]
    schedulers = [names | {"aliases": None, "default_rho": -1, "need_inner_model": False} for names in schedulers]
    model = {"title": title, "model_name": title, "hash": None, "sha256": None, "filename": title, "config": None}
    settings = {"sd_model_checkpoint": title, "sd_checkpoint_hash": "", "samples_format": "png"}
    settings |= {"CLIP_stop_at_last_layers": 1, "sampler_name": SAMPLERS.get(solver, solver)}

    async def text_to_image(http: Http) -> Response:
        body = checked(TextToImage, await json_object(http), 422)
        return await _answer(service, http, running, body, {})

    async def image_to_image(http: Http) -> Response:
        body = checked(ImageToImage, await json_object(http), 422)
        return await _answer(service, http, running, body, _images(service, body))

    async def interrupt(http: Http) -> Response:
        for job in running:
            service.engine.cancel(job)
        return JSONResponse({})

    async def progress(http: Http) -> Response:
        return JSONResponse(_progress(running))

    async def options(http: Http) -> Response:
        if http.method == "POST":
            await json_object(http)  # there is one model, and nothing else to set
            return JSONResponse({})
        return JSONResponse(settings)

    return [
        Route("/sdapi/v1/txt2img", text_to_image, methods=["POST"]),
        Route("/sdapi/v1/img2img", image_to_image, methods=["POST"]),
        Route("/sdapi/v1/interrupt", interrupt, methods=["POST"]),
        Route("/sdapi/v1/skip", interrupt, methods=["POST"]),
        Route("/sdapi/v1/progress", progress),
        Route("/sdapi/v1/samplers", _always(samplers)),
        Route("/sdapi/v1/schedulers", _always(schedulers)),
        Route("/sdapi/v1/sd-models", _always([model])),
        Route("/sdapi/v1/options", options, methods=["GET", "POST"]),
        Route("/sdapi/v1/scripts", _always({"txt2img": [], "img2img": []})),
        *(Route(f"/sdapi/v1/{name}", _always([])) for name in ("loras", "upscalers", "sd-vae", "hypernetworks")),
    ]


def _always(content: Any) -> Callable[[Http], Awaitable[Response]]:
    """The endpoint whose answer never changes."""

    async def answer(http: Http) -> Response:
        return JSONResponse(content)

    return answer


def _progress(running: dict[Job, Progress]) -> dict[str, Any]:
    """How far the first of the running jobs is, with a preview."""
    job, step = next(iter(running.items()), (None, Progress(0, 1, {})))
    done_part = (1 - job.left / len(job.pictures)) if job else 0.0
    part = min(done_part + step.done / step.total / len(job.pictures), 1.0) if job else 0.0
    state = {"skipped": False, "interrupted": False, "job": "txt2img" if job else "", "job_count": len(running)}
    state |= {"job_no": 0, "job_timestamp": "0", "sampling_step": step.done, "sampling_steps": step.total * bool(job)}
    preview = png(step.previews[min(step.previews)], {}) if step.previews else None
    return {"progress": part, "eta_relative": 0.0, "state": state, "current_image": preview, "textinfo": None}


def _images(service: Service, body: ImageToImage) -> dict[str, Any]:
    values = {"image": body.init_images[0]}
    if body.denoising_strength is not None:
        values["strength"] = body.denoising_strength
    if body.mask is not None:
        values["mask"] = _mask(body, service.limits.max_pixels)
    return values


def _mask(body: ImageToImage, max_pixels: int) -> str:
    """The mask in base64, stretched to the size of the image as the web UI does."""
    field = "init_images"
    try:
        size = uploads.picture(uploads.from_base64(body.init_images[0]), max_pixels).shape[:2]
        field = "mask"
        mask = uploads.mask_of_size(uploads.from_base64(body.mask), size, max_pixels, bool(body.inpainting_mask_invert))
    except ValueError as error:
        raise Problem(422, f"{field}: {error}", field) from error
    return base64.b64encode(mask).decode()


def _internal_name(name: str, table: Mapping[str, str]) -> str:
    """Our name for a name of the web UI, upper or lower case."""
    names = {label.lower(): internal for internal, label in table.items()}
    return names.get(name.lower(), name)


def _values(body: TextToImage, images: dict[str, Any]) -> dict[str, Any]:
    """The request in fields of `schema.Request`."""
    values: dict[str, Any] = {"prompt": body.prompt, "negative_prompt": body.negative_prompt} | images
    values |= {"num_images": body.batch_size * body.n_iter, "previews": "some"}
    if body.seed != -1:
        values["seed"] = body.seed
    sampler = body.sampler_name or body.sampler_index
    optional = {"steps": body.steps, "guidance": body.cfg_scale, "width": body.width, "height": body.height}
    optional["solver"] = _internal_name(sampler, SAMPLERS) if sampler else None
    optional["spacing"] = _internal_name(body.scheduler, SCHEDULERS) if body.scheduler else None
    return values | {name: value for name, value in optional.items() if value is not None}


async def _answer(
    service: Service, http: Http, running: dict[Job, Progress], body: TextToImage, images: dict[str, Any]
) -> Response:
    """The answer with the pictures. After an interrupt, the last preview stands for a picture that is not done."""
    queued = await service.ask(_values(body, images))
    job, finished, previews = queued.job, {}, {}
    running[job] = Progress(0, 1, {})
    try:
        async for event in service.follow(http.is_disconnected, queued):
            match event:
                case Progress():
                    previews |= event.previews
                    running[job] = event._replace(previews=dict(previews))
                case PictureDone(number=number):
                    finished[number] = await service.png(queued, event)
                case Ended(error=error) if error and error != CANCELLED:
                    raise problem(error)
    finally:
        del running[job]
    finished = {number: png(image, {}) for number, image in previews.items()} | finished
    pictures = [finished[number] for number in sorted(finished)]
    info = _info(queued.request, job, body)
    content = {"images": pictures if body.send_images else [], "parameters": body.model_dump(exclude={"mask"})}
    return JSONResponse(content | {"info": json.dumps(info)})


def _info(request: Request, job: Job, body: TextToImage) -> dict[str, Any]:
    seeds = [picture.seed for picture in job.pictures]
    sampler = SAMPLERS.get(request.solver, request.solver)
    size = f"{request.width}x{request.height}"
    about = f"Steps: {request.steps}, Sampler: {sampler}, CFG scale: {request.guidance}"
    negative = f"\nNegative prompt: {request.negative_prompt}" if request.negative_prompt else ""
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(seeds),
        "negative_prompt": request.negative_prompt,
        "seed": seeds[0],
        "all_seeds": seeds,
        "width": request.width,
        "height": request.height,
        "sampler_name": sampler,
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": body.batch_size,
        "infotexts": [f"{request.prompt}{negative}\n{about}, Seed: {seed}, Size: {size}" for seed in seeds],
    }
