"""The requests of AUTOMATIC1111's web UI, as fields of `schema.Request`, and what of them has no effect here."""

import base64
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffusion_jax.build.fields import SEEDS
from diffusion_jax.serve import uploads
from diffusion_jax.serve.bodies import warning, without_effect
from diffusion_jax.serve.samplers import sampler, scheduler
from diffusion_jax.serve.schema import Problem
from diffusion_jax.serve.service import Service

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


def images_of(service: Service, body: ImageToImage) -> dict[str, Any]:
    """The pictures of a request, and how they are used, in fields of `schema.Request`. Raises Problem."""
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


def values_and_notes(service: Service, body: TextToImage, images: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The request in fields of `schema.Request`, and notes for the answer. images: from `images_of`. Raises Problem."""
    method, notes = _method(service, body)
    guidance, more_notes = _guidance(service, body)
    values = {"prompt": body.prompt, "negative_prompt": body.negative_prompt} | method | guidance | images
    values |= {"num_images": body.batch_size * body.n_iter, "previews": "some"}
    if body.seed >= 0:
        values["seed"] = body.seed % SEEDS  # larger ones are usual there
    optional = {"steps": body.steps, "width": body.width, "height": body.height}
    return values | {name: value for name, value in optional.items() if value is not None}, notes + more_notes


def ignored(body: TextToImage, model: str) -> list[str]:
    """A warning for each field and setting of a request that has no effect here but would change the picture there."""
    names = without_effect(body.model_extra or {}, WITHOUT_EFFECT)
    if "alwayson_scripts" in names and isinstance(scripts := body.model_extra["alwayson_scripts"], dict):
        names.remove("alwayson_scripts")
        names += [f"alwayson_scripts.{name}" for name, script in scripts.items() if _is_on(script)]
    names += [f"override_settings.{name}" for name in ignored_options(body.override_settings, model)]
    if isinstance(body, ImageToImage):
        names += [f"init_images.{i}" for i in range(1, len(body.init_images))]
        names += [] if body.resize_mode in FITS else [f"resize_mode={body.resize_mode}"]
    return [warning(name) for name in names] + (
        [f"seed={body.seed} became {body.seed % SEEDS}"] if body.seed >= SEEDS else []
    )


def ignored_options(options: Mapping[str, Any], model: str) -> list[str]:
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
