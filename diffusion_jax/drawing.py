"""What config.sample asks for, drawn batch by batch."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, PyTree, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax import build, pictures
from diffusion_jax.build import Model
from diffusion_jax.core.solvers import Plan
from diffusion_jax.data.transforms import BadRecord, crop, decode, to_uint8
from diffusion_jax.pipelines import Guidance, Pipeline, guided, image_to_image, inpaint, text_to_image

NOT_NOTED = ("prompts", "num_images", "batch_size", "seed")  # fields that say nothing of a single picture


class Request(NamedTuple):
    """What config.sample asks for. prompts, and their conditions, leaves (prompts, ...). jobs: (number of the prompt,
    seed) of every image. image (H, W, 3) uint8 and mask (H, W, 1), True where it is made new, of the model's size; None
    for pictures from prompts alone.
    """

    prompts: tuple[str, ...]
    cond: PyTree
    jobs: list[tuple[int, int]]
    plan: Plan
    guidance: Guidance
    image: UInt8[np.ndarray, "height width 3"] | None
    mask: Bool[np.ndarray, "height width 1"] | None


class Drawn(NamedTuple):
    """One sampled image, uint8 (H, W, 3), and what made it."""

    prompt: str
    seed: int
    image: np.ndarray


def request(config: ConfigDict, model: Model) -> Request:
    """What config.sample asks for. Raises ValueError for what is wrong with it, before any network is there."""
    section = config.sample
    prompts = tuple(section.prompts)
    jobs = [(i, section.seed + k) for i in range(len(prompts)) for k in range(section.num_images)]
    if not jobs:
        raise ValueError("nothing to draw: sample.prompts is empty or sample.num_images is 0")
    if section.mask and not section.image:
        raise ValueError("sample.mask says where an image is made new: name the image too, sample.image")
    if section.resample != 1 and not section.mask:
        raise ValueError("sample.resample fits new parts to old ones: it needs sample.image and sample.mask")
    # together, so that all come out of one length
    cond = model.conditioning.of_prompts([*prompts, *([section.negative_prompt] if section.negative_prompt else [])])
    negative = jax.tree.map(lambda leaf: leaf[-1], cond) if section.negative_prompt else None
    plan, guidance = build.plan(config, model), build.guidance(config, negative)
    # what is wrong with its numbers raises here
    guided(lambda x, level, cond: None, guidance, model.conditioning.null, 1.0)
    return Request(prompts, cond, jobs, plan, guidance, *_image_and_mask(config, model.size))


def _image_and_mask(config: ConfigDict, size: tuple[int, int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    section = config.sample
    if not section.image:
        return None, None
    resize, rng = crop(*size, upscale=True), np.random.default_rng(0)  # the crop is the centre's
    image, mask = _read(section.image, "sample.image"), None
    if section.mask:
        mask = _read(section.mask, "sample.mask")
        if mask.shape != image.shape:
            sizes = [f"{width}x{height}" for height, width, _ in (mask.shape, image.shape)]
            raise ValueError(f"sample.mask is {sizes[0]} pixels and sample.image {sizes[1]}: they must be of one size")
        mask = resize({"image": mask}, rng)["image"][..., :1] > 127
    return resize({"image": image}, rng)["image"], mask


def _read(path: str, field: str) -> np.ndarray:
    try:
        return decode(path)
    except BadRecord as error:
        raise ValueError(f"{field} {path}: {error}") from error


def draw(request: Request, pipeline: Pipeline, batch_size: int, progress: bool = False) -> Iterator[Drawn]:
    """Every job of the request, in batches of one size, the last one filled up. progress: show a bar of the steps."""
    jobs, plan = request.jobs, request.plan
    size = min(batch_size, len(jobs))
    size += -size % jax.local_device_count()
    with tqdm(total=plan.num_rows * -(-len(jobs) // size), desc="drawing", unit="step", disable=not progress) as bar:
        for i, start in enumerate(range(0, len(jobs), size)):

            def show(done: int, x0: jax.Array, before: int = i * plan.num_rows) -> None:
                jax.block_until_ready(x0)
                bar.update(before + done - bar.n)

            batch = jobs[start : start + size]
            full = batch + batch[-1:] * (size - len(batch))
            which, seeds = np.array(full).T
            cond = jax.tree.map(lambda leaf: leaf[which], request.cond)  # noqa: B023
            keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
            images = _images(request, pipeline, cond, keys, show if progress else None)
            for (i, seed), image in zip(batch, np.asarray(to_uint8(images)), strict=False):
                yield Drawn(request.prompts[i], seed, image)


def _images(request: Request, pipeline: Pipeline, cond, keys, callback) -> jax.Array:
    """One batch by the pipeline that the request needs."""
    rest = (cond, keys, request.plan, request.guidance)
    if request.image is None:
        return text_to_image(pipeline, *rest, callback=callback)
    image = np.repeat(request.image[None], len(keys), axis=0)
    if request.mask is None:
        return image_to_image(pipeline, image, *rest, callback=callback)
    return inpaint(pipeline, image, request.mask[None], *rest, callback=callback)


def sheet(config: ConfigDict, drawn: Sequence[Drawn]) -> np.ndarray:
    """All images on one sheet, those of a prompt in a row."""
    return pictures.grid([one.image for one in drawn], config.sample.num_images, [one.prompt for one in drawn])


def texts(config: ConfigDict, prompt: str, seed: int, origin: str) -> dict[str, str]:
    """What a picture says of how it was made, for its PNG text chunk."""
    fields = {name: str(value) for name, value in config.sample.items() if name not in NOT_NOTED and value is not None}
    return {"prompt": prompt, "seed": str(seed), **fields, "weights": origin, "config": config.to_json_best_effort()}
