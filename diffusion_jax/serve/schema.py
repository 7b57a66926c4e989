"""The schema of requests. The checks, the OpenAPI description, the controls of the page and the fields of the APIs of
other programs come from it.
"""

import base64
import io
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from ml_collections import ConfigDict as Config
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from diffusion_jax import pictures
from diffusion_jax.build.fields import SEEDS
from diffusion_jax.data.crops import centred, centred_mask, check_one_size, stretched
from diffusion_jax.serve import sizes, uploads
from diffusion_jax.serve.drawing import INVERTIBLE, Picture, Shared
from diffusion_jax.serve.loading import Facts

Kind = TypeVar("Kind", bound=BaseModel)
LETTERS = 10_000  # of a prompt, about as many as fit into `prompts.MAX_CHUNKS`
SCALE, SLIDER = 1000.0, 30.0  # the largest guidance scale, and that on the page's slider
# fields left out of a PNG's text
NOT_IN_METADATA = {"image", "mask", "references", "fit", "seed", "prompt", "num_images", "previews"}


class Problem(Exception):
    """An error, as the answer to a request.

    status: of HTTP.
    reason: what is wrong with the field, or with the whole request.
    field: that is wrong, or "".
    retry: seconds after which to try again, or 0.
    """

    def __init__(self, status: int, reason: str, field: str = "", retry: int = 0):
        self.status, self.reason, self.field, self.retry = status, reason, field, retry
        self.message = f"{field}: {reason}" if field else reason
        super().__init__(self.message)


class Request(BaseModel):
    """Pictures to draw. `of_model` adds the limits of a model and of the server."""

    model_config = ConfigDict(extra="forbid", strict=True)

    task: Literal["generate", "style", "morph", "noise"] = Field(
        "generate",
        description="generate: from a prompt, or from an image, or inside a mask. style: an image in the style of the "
        "prompt. morph: from one prompt and seed to another. noise: an image under more and more noise.",
    )
    prompt: str = Field("", max_length=LETTERS, title="Prompt", description="What to draw.")
    negative_prompt: str = Field("", max_length=LETTERS, title="Negative prompt", description="What to move away from.")
    other_prompt: str = Field(
        "", max_length=LETTERS, title="Other prompt", description="style: what the image shows. morph: where it ends."
    )
    solver: str = Field("", title="Method", description="The solver, which removes the noise step by step.")
    spacing: str = Field(
        "", title="How the steps are spread", description="Automatic, or empty in a request: as usual for the method."
    )
    steps: int = Field(20, ge=1, title="Steps", description="More steps take longer and are more exact.")
    guidance: float = Field(1.0, title="Guidance", description="How closely the picture follows the prompt.")
    strength: float = Field(0.6, ge=0, le=1, title="Strength", description="How much of the image changes.")
    width: int = Field(64, title="Width", description="Pixels.")
    height: int = Field(64, title="Height", description="Pixels.")
    seed: int | None = Field(
        None, ge=0, lt=SEEDS, title="Seed", description="The same seed draws the same picture; empty for a new one."
    )
    other_seed: int | None = Field(None, ge=0, lt=SEEDS, title="Last seed", description="morph: the seed it ends with.")
    num_images: int = Field(1, ge=1, title="Pictures", description="How many. Their seeds count up.")
    image: str | None = Field(None, description="PNG, JPEG, WebP, GIF or BMP in base64, or as a data URL.")
    mask: str | None = Field(
        None,
        description="The same, of the image's size. Its light parts are drawn anew; of a mask with transparency, those "
        "that are not transparent.",
    )
    references: list[str] = Field(
        [],
        title="Reference pictures",
        description="Pictures as `image`. The prompt says what to change in them, or what to take from each. Not every "
        "model reads them.",
    )
    fit: Literal["crop", "stretch"] = Field(
        "crop", description="How an image of another shape gets the size: cropped at its centre, or stretched."
    )
    previews: Literal["none", "some", "all"] = Field("none", description="Whether to show what it will become.")

    @field_validator("mask")
    @classmethod
    def _none_if_empty(cls, value: str | None) -> str | None:
        return value or None

    @model_validator(mode="after")
    def _has_its_images(self) -> "Request":
        if self.mask is not None and self.image is None:
            raise ValueError("a mask needs an image")
        if self.task in ("style", "noise") and self.image is None:
            raise ValueError(f"the task {self.task} needs an image")
        if self.task in ("style", "noise", "morph") and self.mask is not None:
            raise ValueError(f"the task {self.task} has no mask")
        if self.task != "generate" and self.references:
            raise ValueError(f"the task {self.task} has no reference pictures")
        return self


def of_model(facts: Facts, limits: Config, name: str = "Request") -> type[Request]:
    """`Request` with the choices, defaults and limits of this model and server.

    limits: config.serve.
    """
    defaults = facts.sampling
    max_side = max(limits.max_side, *(side for size in facts.sizes for side in size))

    def side(title: str, default: int) -> Any:
        about = f"Pixels, at most {limits.max_side} or those of a size of the model; {default} is its own. Other sizes "
        about += "are drawn at the nearest of the model and resized."
        return Field(default, ge=1, le=max_side, title=title, description=about)

    def changed_field(name: str, **changes) -> Any:
        """The field of `Request` with these changes."""
        field = Request.model_fields[name]
        return Field(**{"title": field.title, "description": field.description, "default": field.default} | changes)

    scale = {"default": defaults["guidance"], "ge": 1.0, "le": SCALE, "json_schema_extra": {"x-slider": SLIDER}}
    if not facts.guided:
        scale |= {"ge": defaults["guidance"], "le": defaults["guidance"]}

    fields = {
        "task": (Literal[facts.tasks], changed_field("task")),
        "solver": (Literal[facts.solvers], changed_field("solver", default=defaults["solver"])),
        "spacing": (Literal[facts.spacings], changed_field("spacing", default=defaults["spacing"])),
        "steps": (
            int,
            changed_field("steps", default=defaults["steps"], ge=1, le=max(limits.max_steps, defaults["steps"])),
        ),
        "guidance": (float, changed_field("guidance", **scale)),
        "width": (int, side("Width", facts.size[1])),
        "height": (int, side("Height", facts.size[0])),
        "num_images": (int, changed_field("num_images", ge=1, le=limits.max_images)),
        "references": (list[str], changed_field("references", max_length=facts.references)),
    }
    return create_model(name, __base__=Request, __doc__="Pictures to draw.", **fields)


def checked(kind: type[Kind], values: Any, status: int = 400) -> Kind:
    """The request of this kind with these values. Raises Problem of this status, naming the first field that is
    wrong.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise Problem(status, first["msg"].removeprefix("Value error, "), field) from error


def to_frame(request: Request, model_sizes: Sequence[tuple[int, int]], limits: Config) -> sizes.Frame:
    """The request's size and that which is drawn for it, the uploaded pictures decoded. Raises Problem for what cannot
    be used.

    model_sizes: `loading.Facts.sizes`. Each may be larger than limits.max_side.
    limits: config.serve.
    """
    size = request.height, request.width
    for name, side in zip(("height", "width"), size, strict=True):
        if side > limits.max_side and size not in model_sizes:
            own = ", ".join(map(sizes.written, model_sizes))
            raise Problem(400, f"expected at most {limits.max_side} pixels, or a size of the model: {own}", name)
    image, mask = _image_and_mask(request, size, limits.max_pixels)
    references = tuple(_reference(text, request, size, limits.max_pixels) for text in request.references)
    return sizes.Frame(size, sizes.nearest(size, model_sizes), image, mask, references)


def to_pictures(request: Request, frame: sizes.Frame, live: bool = False) -> list[Picture]:
    """The pictures of a request.

    live: whether it is a frame of the live canvas.
    """
    (image, mask), references = frame.entered(), frame.entered_references()
    shared = Shared(
        task=request.task,
        size=frame.drawn,
        solver=INVERTIBLE if request.task == "style" else request.solver,
        spacing=request.spacing,
        steps=request.steps,
        strength=request.strength if image is not None and request.task != "noise" else 1.0,
        guided=request.guidance != 1,
        image=image is not None,
        mask=mask is not None,
        live=live,
        references=len(references),
    )
    seed, other_seed = (secrets.randbelow(SEEDS) if s is None else s for s in (request.seed, request.other_seed))
    count, along = request.num_images, request.task in ("morph", "noise")
    return [
        Picture(
            shared,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            guidance=request.guidance,
            seed=seed if along else (seed + i) % SEEDS,
            image=image,
            mask=mask,
            references=references,
            other_prompt=request.other_prompt,
            other_seed=other_seed,
            weight=i / max(count - 1, 1) if along else 0.0,
        )
        for i in range(count)
    ]


def _image_and_mask(
    request: Request, size: tuple[int, int], max_pixels: int
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The image, (H, W, 3) uint8, and the mask, (H, W, 1), True where it is light, both of `size`, or None."""
    if request.image is None:
        return None, None
    field = "image"
    try:
        image = mask = uploads.picture(uploads.from_base64(request.image), max_pixels)
        if request.mask is not None:
            field = "mask"
            mask = uploads.mask(uploads.from_base64(request.mask), max_pixels)
            check_one_size(mask, image)
        if request.fit == "stretch":
            image, mask = stretched(image, size), stretched(mask, size)
        return centred(image, size), None if request.mask is None else centred_mask(mask, size)
    except ValueError as error:
        raise Problem(400, str(error), field) from error


def _reference(text: str, request: Request, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """A reference picture, (H, W, 3) uint8 of `size`."""
    try:
        picture = uploads.picture(uploads.from_base64(text), max_pixels)
        return stretched(picture, size) if request.fit == "stretch" else centred(picture, size)
    except ValueError as error:
        raise Problem(400, str(error), "references") from error


def texts(request: Request, picture: Picture, weights: str) -> dict[str, str]:
    """The settings of a picture, for its PNG text chunk: fields of the request, with the picture's own seed."""
    settings = request.model_dump(exclude=NOT_IN_METADATA, exclude_none=True)
    if request.image is None:
        del settings["strength"]
    if picture.shared.size != (request.height, request.width):
        settings["drawn"] = sizes.written(picture.shared.size)
    shared = picture.shared
    made_with = {"live canvas": shared.live, "mask": shared.mask, "references": shared.references}
    if any(made_with.values()):
        settings["made_with"] = next(name for name, is_so in made_with.items() if is_so)
    if request.task == "morph":
        settings["other_seed"] = picture.other_seed
    return {"prompt": request.prompt, "seed": str(picture.seed), **{k: str(v) for k, v in settings.items()}} | {
        "weights": weights
    }


def png(image: np.ndarray, about: dict[str, str]) -> str:
    """The image, (H, W, 3) uint8, as a PNG with its settings, in base64."""
    return _encoded(pictures.save, image, about)


def animation(images: Sequence[np.ndarray], about: dict[str, str]) -> str:
    """The images as an animated PNG with its settings, in base64."""
    return _encoded(pictures.save_animation, images, about)


def gif(images: Sequence[np.ndarray]) -> str:
    """The images as an animated GIF in base64."""
    return _encoded(pictures.save_gif, images)


def _encoded(save: Callable, *arguments: Any) -> str:
    file = io.BytesIO()
    save(file, *arguments)
    return base64.b64encode(file.getvalue()).decode()
