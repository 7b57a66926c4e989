"""--mode=sample: generate the images of config.sample, batch by batch."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Key, PyTree, UInt8
from ml_collections import ConfigDict

from diffusion_jax import build, parallel, paths, pictures
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.build import weights
from diffusion_jax.core.guidance import Guidance
from diffusion_jax.core.solvers import Plan
from diffusion_jax.data.batching import filled_batches
from diffusion_jax.data.crops import centred, centred_mask, check_one_size
from diffusion_jax.data.transforms import BadRecord, decode, decode_mask, to_uint8
from diffusion_jax.evaluation.batches import map_over_hosts
from diffusion_jax.messages import Progress
from diffusion_jax.model import DiffusionModel, none_held_back
from diffusion_jax.paths import Path
from diffusion_jax.pipelines import generate as pipeline
from diffusion_jax.pipelines import image_to_image, inpaint, text_to_image, with_references
from diffusion_jax.pipelines.generate import Callback
from diffusion_jax.stored import give_back

CHUNK = 256  # prompts whose conditions are in memory at once
HELD_BACK = (
    "the safety checker holds back the picture of %r, seed %d: it is black (config.safety_checker=False shows it)"
)
NOT_IN_METADATA = ("prompts", "num_images", "batch_size", "seed")  # fields that do not describe a single picture


class Request(NamedTuple):
    """The images to generate for config.sample.

    prompts, cond: the prompts and their conditions, leaves (prompts, ...).
    jobs: (index of the prompt, seed) of every image.
    image: (H, W, 3) uint8 of the model's size. None for pictures from prompts only.
    mask: (H, W, 1), True where the image is generated. None for no mask.
    """

    prompts: tuple[str, ...]
    cond: PyTree
    jobs: list[tuple[int, int]]
    plan: Plan
    guidance: Guidance
    image: UInt8[np.ndarray, "height width 3"] | None
    mask: Bool[np.ndarray, "height width 1"] | None


class Generated(NamedTuple):
    """One generated image, uint8 (H, W, 3), with its prompt and seed."""

    prompt: str
    seed: int
    image: np.ndarray


def run(config: ConfigDict, workdir: Path) -> None:
    """Generate config.sample.num_images for each of config.sample.prompts into workdir/samples.

    config.sample.image is the starting image, config.sample.mask its part to inpaint. The prompts may refer to the
    pictures config.sample.references. A config without a denoiser shows held-out images, each above its reconstruction.
    """
    folder = workdir / "samples"
    if not build.model.has_denoiser(config):
        from diffusion_jax.app import first_stage  # imported late: training takes large libraries

        reconstructions = first_stage.reconstruct_held_out(config, workdir)
        make_writable(folder)
        pictures.save(folder / "grid.png", reconstructions, {"weights": str(workdir)})
        logging.info("wrote %s", folder / "grid.png")
        return
    config = weights.resolved(config, workdir)
    model = build.model.diffusion_model(config, (config.sample.height, config.sample.width))
    model = _as_large_as_reference(config, model)
    sample_request = request(config, model, config.sample.prompts)
    model.conditioning.release()
    model, origin = weights.load(config, workdir, model)
    logging.info("weights: %s", origin)
    make_writable(folder)
    generated, in_turns = [], build.sampling.in_turns(config, model)
    for result in generate(sample_request, model, config.sample.batch_size, in_turns, progress=True):
        if not generated:
            _clear(folder)
        texts = _texts(config, result.prompt, result.seed, origin)
        pictures.save(folder / f"{len(generated):04d}.png", result.image, texts)
        generated.append(result)
    texts = _texts(config, "; ".join(config.sample.prompts), config.sample.seed, origin)
    pictures.save(folder / "grid.png", sheet(config, generated), texts)
    logging.info("wrote %d images and %s", len(generated), folder / "grid.png")


def _clear(folder: Path) -> None:
    """Remove the pictures of an earlier run."""
    for path in folder.glob("[0-9]*.png"):
        path.unlink()


def request(config: ConfigDict, model: DiffusionModel, prompts: Sequence[str]) -> Request:
    """Read config.sample, with these prompts instead of its own. Text encoders read the prompts, and the autoencoder
    the reference pictures. Raises ValueError for anything wrong with it.
    """
    section, prompts = config.sample, tuple(prompts)
    jobs = [(i, section.seed + k) for i in range(len(prompts)) for k in range(section.num_images)]
    if not jobs:
        raise ValueError("nothing to generate: sample.prompts is empty or sample.num_images is 0")
    if section.mask and not section.image:
        raise ValueError("sample.mask marks the part of an image to generate: set sample.image too")
    if section.resample != 1 and not section.mask:
        raise ValueError("sample.resample is for inpainting: it needs sample.image and sample.mask")
    # in one call, so that all have the same length
    cond = model.conditioning.of_prompts([*prompts, *([section.negative_prompt] if section.negative_prompt else [])])
    negative = jax.tree.map(lambda leaf: leaf[-1], cond) if section.negative_prompt else None
    cond = with_references(model, cond, [picture[None] for picture in _references(config)])
    strength = section.strength if section.image and not section.mask else 1.0
    plan, guidance = build.sampling.plan_and_guidance(config, model, strength, negative)
    return Request(prompts, cond, jobs, plan, guidance, *_image_and_mask(config, model.size))


def check(config: ConfigDict, model: DiffusionModel) -> None:
    """Raise ValueError for anything wrong with config.sample. The model may have shapes instead of weights."""
    model.references.check(len(config.sample.references))
    for picture in _references(config):
        model.references.fitted(picture, model.cell)
    config = ConfigDict(config).copy_and_resolve_references()
    config.sample.references = ()  # to encode them takes weights
    request(config, model, config.sample.prompts)


def _references(config: ConfigDict) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    return [_read(decode, path, "sample.references") for path in config.sample.references]


def _as_large_as_reference(config: ConfigDict, model: DiffusionModel) -> DiffusionModel:
    """The model for pictures of the size of the first reference, where config.sample does not name a side."""
    sides, references = (config.sample.height, config.sample.width), model.references
    if all(sides) or not config.sample.references:
        return model
    references.check(len(config.sample.references))
    own = references.fitted(_references(config)[0], model.cell).shape
    return model.resized((sides[0] or own[0], sides[1] or own[1]))


def _image_and_mask(config: ConfigDict, size: tuple[int, int]) -> tuple[np.ndarray | None, np.ndarray | None]:
    section = config.sample
    if not section.image:
        return None, None
    image = _read(decode, section.image, "sample.image")
    if not section.mask:
        return centred(image, size), None
    mask = _read(decode_mask, section.mask, "sample.mask")
    check_one_size(mask, image, ("sample.mask", "sample.image"))
    return centred(image, size), centred_mask(mask, size)


def _read(decode: Callable[[str], np.ndarray], path: str, field: str) -> np.ndarray:
    try:
        return decode(str(paths.local(path, f"config.{field}")))
    except BadRecord as error:
        raise ValueError(f"{field} {path}: {error}") from error


def generate(
    request: Request, model: DiffusionModel, batch_size: int, in_turns: bool = False, progress: bool = False
) -> Iterator[Generated]:
    """Generate every job of the request, in batches of one size.

    in_turns: keep only the network that is in use on the device. Pictures from prompts alone are then all decoded at
      the end; other pictures need the networks anew in each batch.
    progress: show a progress bar of the steps.
    """
    jobs, plan = request.jobs, request.plan
    size = parallel.divisible(min(batch_size, len(jobs)))
    batches = list(filled_batches(jobs, size))
    with Progress("sampling", plan.num_rows * len(batches), "step", shown=progress) as bar:

        def show(i: int, done: int, x0: jax.Array) -> None:
            jax.block_until_ready(x0)
            bar.update(i * plan.num_rows + done - bar.done)

        callbacks = (functools.partial(show, i) if progress else None for i in range(len(batches)))
        inputs = (_inputs(request, batch, back) for (_, batch), back in zip(batches, callbacks, strict=True))
        for (count, batch), drawn in zip(batches, _drawn(request, model, inputs, in_turns), strict=True):
            images = to_uint8(np.asarray(drawn))
            for (prompt, seed), image, held_back in zip(batch[:count], images, model.held_back(images), strict=False):
                if held_back:
                    logging.warning(HELD_BACK, request.prompts[prompt], seed)
                yield Generated(request.prompts[prompt], seed, np.zeros_like(image) if held_back else image)


def _inputs(request: Request, batch: Sequence[tuple[int, int]], callback: Callback) -> tuple:
    """Condition, keys, plan, guidance and callback of a batch of jobs, as pipelines take them."""
    prompt_indices, seeds = np.array(batch).T
    cond = jax.tree.map(lambda leaf: leaf[prompt_indices], request.cond)
    keys = jax.vmap(jax.random.key)(seeds.astype(np.uint32))
    return cond, keys, request.plan, request.guidance, callback


def _drawn(request: Request, model: DiffusionModel, inputs: Iterable[tuple], in_turns: bool) -> Iterator[jax.Array]:
    """The images of each batch, about [-1, 1]. Arguments as in `generate`."""
    if not in_turns or request.image is not None:
        placed = model if in_turns else model.placed()
        yield from (_images(request, placed, *batch) for batch in inputs)
        return
    decoder, denoiser = model, model._replace(params=parallel.whole(model.params))
    latents = [np.asarray(_latents(denoiser, *batch)) for batch in inputs]
    del denoiser, model  # with the weights that were stored
    give_back()
    decoder = decoder._replace(codec=decoder.codec._replace(params=parallel.whole(decoder.codec.params)))
    yield from (pipeline.decode(decoder, x0) for x0 in latents)


def _latents(model: DiffusionModel, cond: PyTree, keys: Key[Array, "batch"], plan: Plan, *arguments: Any) -> jax.Array:
    """The x0 of the images of one batch. arguments: the others of `_inputs`."""
    return pipeline.solve(model, pipeline.noise(model, keys, plan.initial), cond, keys, plan, *arguments)


def generate_pictures(
    config: ConfigDict, model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], scale: float
) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """Generate a picture for each prompt and seed by the solver of config.sample, for measurements. Each of several
    hosts generates a share and gets all pictures. The memory does not depend on the number of pictures.

    No picture is held back, because a black one would be measured: see `with_held_back` for showing them.

    scale: of guidance.
    """
    in_turns = build.sampling.in_turns(config, model)
    model, size = model if in_turns else model.placed(), parallel.divisible(min(config.sample.batch_size, len(prompts)))
    model, config = model._replace(held_back=none_held_back), _at_scale(config, scale)

    def share(jobs: list[tuple[str, int]]) -> Iterator[np.ndarray]:
        sample_request = request(config, model, [prompt for prompt, _ in jobs])
        sample_request = sample_request._replace(jobs=[(i, seed) for i, (_, seed) in enumerate(jobs)])
        if in_turns:
            model.conditioning.release()
        for result in generate(sample_request, model, size, in_turns):
            progress.update(min(jax.process_count(), len(prompts) - progress.done))
            yield result.image

    with Progress("sampling", len(prompts), "picture") as progress:
        yield from map_over_hosts(share, list(zip(prompts, seeds, strict=True)), size * -(-CHUNK // size), size)


def with_held_back(model: DiffusionModel, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The images to show: black where the model's safety checker holds one back."""
    held_back = model.held_back(np.stack(images))
    return [np.zeros_like(image) if hidden else image for image, hidden in zip(images, held_back, strict=True)]


def measured_scales(config: ConfigDict, model: DiffusionModel, prompts: Sequence[str]) -> tuple[float, ...]:
    """The guidance scales to measure at: config.eval.scales, or that of sampling. Raises ValueError for settings that
    cannot be used, at any of them.
    """
    if not config.eval.scales:
        request(config, model, prompts)
        return (config.sample.guidance,)
    for scale in config.eval.scales:
        try:
            request(_at_scale(config, scale), model, prompts)
        except ValueError as error:
            raise ValueError(f"eval.scales={scale:g}: {error}") from error
    return tuple(config.eval.scales)


def _at_scale(config: ConfigDict, scale: float) -> ConfigDict:
    config = ConfigDict(config).copy_and_resolve_references()
    config.sample.guidance = float(scale)
    return config


def _images(request: Request, model: DiffusionModel, *arguments: Any) -> jax.Array:
    """Generate one batch with the pipeline that the request needs. arguments: of `_inputs`."""
    if request.image is None:
        return text_to_image(model, *arguments)
    image = np.repeat(request.image[None], len(arguments[1]), axis=0)
    if request.mask is None:
        return image_to_image(model, image, *arguments)
    return inpaint(model, image, request.mask[None], *arguments)


def sheet(config: ConfigDict, generated: Sequence[Generated]) -> np.ndarray:
    """All images on one sheet, one row for each prompt."""
    return pictures.grid(
        [result.image for result in generated], config.sample.num_images, [result.prompt for result in generated]
    )


def _texts(config: ConfigDict, prompt: str, seed: int, origin: str) -> dict[str, str]:
    """The settings of a picture, for its PNG text chunk."""
    fields = {
        name: str(value) for name, value in config.sample.items() if name not in NOT_IN_METADATA and value is not None
    }
    return {"prompt": prompt, "seed": str(seed), **fields, "weights": origin, "config": config.to_json_best_effort()}
