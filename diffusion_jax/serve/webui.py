"""The API of AUTOMATIC1111's web UI for its clients: /sdapi/v1/txt2img, img2img, and the lists that they read first."""

import asyncio
import base64
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffusion_jax.build.fields import SEEDS
from diffusion_jax.messages import as_json
from diffusion_jax.serve import uploads
from diffusion_jax.serve.bodies import json_object, warning, without_effect
from diffusion_jax.serve.engine import CANCELLED, Ended, Job, PictureDone, Progress
from diffusion_jax.serve.guard import client_of
from diffusion_jax.serve.samplers import SAMPLERS, SCHEDULERS, sampler, scheduler
from diffusion_jax.serve.schema import Problem, checked, png
from diffusion_jax.serve.service import Gone, QueuedRequest, Service, problem

FIELDS = {  # of `schema.Request` -> their names here
    "num_images": "batch_size",
    "guidance": "cfg_scale",
    "solver": "sampler_name",
    "spacing": "scheduler",
    "strength": "denoising_strength",
    "image": "init_images",
    "fit": "resize_mode",
}
FITS = {0: "stretch", 1: "crop"}  # resize_mode -> `schema.Request.fit`; for others, crop
WITHOUT_EFFECT = {  # other fields of the API -> values that change no picture; None: no value does
    **dict.fromkeys(("save_images", "do_not_save_samples", "do_not_save_grid", "include_init_images"), None),
    **dict.fromkeys(("override_settings_restore_afterwards", "force_task_id", "comments", "infotext"), None),
    **dict.fromkeys(("subseed", "seed_resize_from_h", "seed_resize_from_w"), None),
    **dict.fromkeys(("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"), None),
    **dict.fromkeys(("hr_prompt", "hr_negative_prompt", "hr_checkpoint_name", "hr_additional_modules"), None),
    **dict.fromkeys(("hr_sampler_name", "hr_scheduler", "hr_cfg", "hr_distilled_cfg", "firstpass_image"), None),
    **dict.fromkeys(("firstphase_width", "firstphase_height", "script_args", "refiner_switch_at"), None),
    **dict.fromkeys(("s_tmin", "s_tmax", "mask_blur_x", "mask_blur_y", "inpaint_full_res_padding"), None),
    **dict.fromkeys(("denoising_strength", "resize_mode"), None),  # of text to image
    "eta": (1,),
    "s_noise": (1,),
    **dict.fromkeys(("subseed_strength", "s_churn", "s_min_uncond"), (0,)),
    "image_cfg_scale": (0, 1.5),
    "mask_blur": (0, 4),
    "mask_round": (True,),
    "inpaint_full_res": (True,),
    "initial_noise_multiplier": (1,),
    "inpainting_fill": (0, 1),  # clients send 0 without being asked
    "distilled_cfg_scale": (3.5,),
    "script_name": ("None",),
    "refiner_checkpoint": ("None",),
}
OPTIONS_WITHOUT_EFFECT = {  # as `WITHOUT_EFFECT`, of options and of override_settings
    **dict.fromkeys(("samples_save", "samples_format", "grid_save", "grid_format", "return_grid"), None),
    **dict.fromkeys(("save_images_add_number", "save_init_img", "enable_pnginfo", "save_txt", "jpeg_quality"), None),
    **dict.fromkeys(("do_not_show_images", "show_progress_type", "live_previews_enable", "sd_checkpoint_hash"), None),
    **dict.fromkeys(("live_preview_content", "show_progress_every_n_steps", "save_write_log_csv"), None),
    **dict.fromkeys(("s_churn", "s_min_uncond", "eta_noise_seed_delta", "img2img_extra_noise"), (0,)),
    **dict.fromkeys(("token_merging_ratio", "token_merging_ratio_img2img", "token_merging_ratio_hr"), (0,)),
    "CLIP_stop_at_last_layers": (0, 1),
    "sd_vae": ("Automatic", "None"),
    "sd_unet": ("Automatic", "None"),
    "eta_ancestral": (1,),
    "s_noise": (1,),
    "img2img_color_correction": (False,),
    "inpainting_mask_weight": (1,),
    "initial_noise_multiplier": (1,),
    "randn_source": ("GPU", "CPU", "NV"),  # seeds give other noise here in any case
}
LISTS = ("loras", "upscalers", "sd-vae", "hypernetworks", "latent-upscale-modes", "realesrgan-models")
LISTS += ("face-restorers", "prompt-styles", "sd-modules", "script-info")  # of which this server has none
ACTIONS = ("refresh-checkpoints", "refresh-vae", "refresh-loras", "refresh-embeddings", "unload-checkpoint")
ACTIONS += ("reload-checkpoint",)  # there is one model, and it stays
OUR_TEXTS = {"prompt", "seed", "steps", "solver", "guidance", "width", "height"}  # of the pictures of this server


class TextToImage(BaseModel):
    """POST /sdapi/v1/txt2img. A null is as good as no value. `info` of the answer warns of what the API has and has no
    effect here.
    """

    model_config = ConfigDict(extra="allow")

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = Field(-1, description="A negative one for a new one.")
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    sampler_name: str | None = Field(None, description="A name of the web UI, such as DPM++ 2M Karras.")
    sampler_index: str | None = None
    scheduler: str | None = Field(None, description="A name of the web UI, such as Karras.")
    send_images: bool = True
    override_settings: dict[str, Any] = Field({}, description="Only the name of the model has a meaning.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        return {name: value for name, value in values.items() if value is not None}


class ImageToImage(TextToImage):
    """POST /sdapi/v1/img2img."""

    init_images: list[Annotated[str, Field(min_length=1)]] = Field(
        min_length=1, description="Pictures in base64; the first is used."
    )
    resize_mode: int = Field(0, description="0: the image is stretched to the size. 1: it covers it, and is cropped.")
    mask: str | None = Field(None, description="Its light parts are drawn anew, or its opaque ones.")
    inpainting_mask_invert: int = Field(0, ge=0, le=1)
    denoising_strength: float | None = None


class Options(BaseModel):
    """POST /sdapi/v1/options. `warnings` of the answer name what has no effect here."""

    model_config = ConfigDict(extra="allow")


class PictureInfo(BaseModel):
    """POST /sdapi/v1/png-info."""

    image: str = Field(description="A PNG in base64.")


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
        images = await asyncio.to_thread(_images, service, body)
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
        return JSONResponse({"warnings": [warning(name) for name in _ignored_options(changed, title)]})

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


def _images(service: Service, body: ImageToImage) -> dict[str, Any]:
    values = {"image": body.init_images[0], "fit": FITS.get(body.resize_mode, "crop")}
    if body.denoising_strength is not None:
        values["strength"] = body.denoising_strength
    if body.mask:
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
        raise Problem(422, str(error), field) from error
    return base64.b64encode(mask).decode()


def _method(service: Service, body: TextToImage) -> tuple[dict[str, str], list[str]]:
    """Solver and spacing in fields of `schema.Request`, and notes for the answer."""
    values, notes = {}, []
    name = body.sampler_name or body.sampler_index
    try:
        if name:
            solver, spacing, notes = sampler(name, service.facts.solvers, service.sample.solver)
            values = {"solver": solver} | ({"spacing": spacing} if spacing else {})
    except ValueError as error:
        raise Problem(422, str(error), "sampler_name") from error
    try:
        if body.scheduler:
            spacing, more = scheduler(body.scheduler, service.facts.spacings)
            values, notes = values | ({"spacing": spacing} if spacing else {}), notes + more
    except ValueError as error:
        raise Problem(422, str(error), "scheduler") from error
    return values, notes


def _guidance(service: Service, body: TextToImage) -> tuple[dict[str, float], list[str]]:
    """The guidance scale as a field of `schema.Request`, and notes: clients send one to models that have none, too."""
    asked = body.cfg_scale
    if not service.facts.guided:
        own = service.facts.sampling["guidance"]
        return {}, [] if asked in (None, own) else [f"cfg_scale={asked:g} has no effect: guidance {own:g} is built in"]
    if asked is not None and asked < 1:
        return {"guidance": 1.0}, [f"cfg_scale={asked:g} became 1, no guidance"]
    return {} if asked is None else {"guidance": asked}, []


def _values(body: TextToImage, method: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """The request in fields of `schema.Request`."""
    values: dict[str, Any] = {"prompt": body.prompt, "negative_prompt": body.negative_prompt} | method | images
    values |= {"num_images": body.batch_size * body.n_iter, "previews": "some"}
    if body.seed >= 0:
        values["seed"] = body.seed % SEEDS  # larger ones are usual there
    optional = {"steps": body.steps, "width": body.width, "height": body.height}
    return values | {name: value for name, value in optional.items() if value is not None}


def _ignored(body: TextToImage, model: str) -> list[str]:
    """A warning for each field and setting of a request that has no effect here but would change the picture there."""
    names = without_effect(body.model_extra or {}, WITHOUT_EFFECT)
    if "alwayson_scripts" in names and isinstance(scripts := body.model_extra["alwayson_scripts"], dict):
        names.remove("alwayson_scripts")
        names += [f"alwayson_scripts.{name}" for name, script in scripts.items() if _is_on(script)]
    names += [f"override_settings.{name}" for name in _ignored_options(body.override_settings, model)]
    if isinstance(body, ImageToImage):
        names += [f"init_images.{i}" for i in range(1, len(body.init_images))]
        names += [] if body.resize_mode in FITS else [f"resize_mode={body.resize_mode}"]
    return [warning(name) for name in names] + (
        [f"seed={body.seed} became {body.seed % SEEDS}"] if body.seed >= SEEDS else []
    )


def _ignored_options(options: Mapping[str, Any], model: str) -> list[str]:
    """The names of options that have no effect here but would change the picture there."""
    return sorted(without_effect(options, OPTIONS_WITHOUT_EFFECT | {"sd_model_checkpoint": (model,)}))


def _is_on(script: Any) -> bool:
    """Whether a script has an effect there: not without arguments, if the first one is False, or if none of its units
    is enabled, as of ControlNet.
    """
    arguments = script.get("args") if isinstance(script, dict) else script
    units = list(arguments.values()) if isinstance(arguments, dict) else arguments
    if not isinstance(units, list):
        return bool(units)
    are_off = [unit is None or (isinstance(unit, dict) and not unit.get("enabled", True)) for unit in units]
    return not (all(are_off) or units[0] is False)


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
    method, notes = _method(service, body)
    guidance, more_notes = _guidance(service, body)
    notes += more_notes
    try:
        queued = await service.ask(client, _values(body, method | guidance, images))
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
    warnings = notes + queued.notes + _ignored(body, service.facts.name)
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
