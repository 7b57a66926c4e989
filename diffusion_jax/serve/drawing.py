"""A batch of requested pictures -> images, by the pipelines, with programs that are compiled once.

The batch size is fixed: a smaller batch is filled up with copies. So every picture comes from the same compiled
program, and is the same bit for bit whatever it is drawn with.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from diffusion_jax import build
from diffusion_jax.core import solvers
from diffusion_jax.core.denoiser import check_levels, check_rows
from diffusion_jax.core.guidance import Guidance
from diffusion_jax.core.process import add_noise
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines import (
    from_noise,
    image_to_image,
    inpaint,
    invert,
    mix,
    text_to_image,
    variations,
    with_references,
)
from diffusion_jax.pipelines.generate import Callback, Every, decode, encode, noise, repeat_texts

PROMPTS = 256  # prompts whose conditions are kept
PLANS = 1024
INVERTIBLE = "ddim"  # the solver that draws a style: it also runs from the image to its noise


class Shared(NamedTuple):
    """What all pictures of a batch have in common: the program and the plan.

    task: generate, style, morph or noise; see `schema.Request`.
    size: height and width, pixels.
    strength: how much of the starting image changes, in [0, 1]. 1 without one.
    guided: whether the guidance scale is not 1.
    image, mask: whether the pictures have a starting image and a mask.
    live: whether it is a frame of the live canvas, drawn by itself.
    references: how many reference pictures the prompts refer to.
    """

    task: str
    size: tuple[int, int]
    solver: str
    spacing: str
    steps: int
    strength: float = 1.0
    guided: bool = True
    image: bool = False
    mask: bool = False
    live: bool = False
    references: int = 0

    def is_prepared(self, own_size: tuple[int, int]) -> bool:
        """Whether its programs are compiled at the start. own_size: of the model's images."""
        return self.size == own_size and self.references <= (0 if self.image or self.live else 1)


class Picture(NamedTuple):
    """One picture to draw.

    image: (H, W, 3) uint8 of the size of `shared`, or None.
    mask: (H, W, 1), True where the image is generated, or None.
    references: pictures that the prompt refers to, (H, W, 3) uint8.
    other_prompt: style: what the image shows, or "". morph: the prompt of the last picture, or "" for the same.
    other_seed: morph: the seed of the last picture.
    weight: in [0, 1]. morph: how far between the first and the last picture. noise: how far from image to noise.
    """

    shared: Shared
    prompt: str
    negative_prompt: str
    guidance: float
    seed: int
    image: np.ndarray | None = None
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()
    other_prompt: str = ""
    other_seed: int = 0
    weight: float = 0.0


def filled(pictures: Sequence[Picture], size: int) -> list[Picture]:
    """The batch filled up to `size` with its last picture."""
    return [*pictures, *pictures[-1:] * (size - len(pictures))]


def usable_solvers(config: ConfigDict, model: DiffusionModel) -> tuple[str, ...]:
    """The names of the solvers that this model can be sampled with. A consistency model has only its own.

    Raises ValueError for a config.sample that cannot be used with this model.
    """
    build.sampling.plan_and_guidance(config, model)
    if build.sampling.is_consistency(config):
        return (*model.published_solvers, config.sample.solver)

    def works(solver: str) -> bool:
        plan, _ = build.sampling.plan_and_guidance(changed(config, solver=solver), model)
        check_levels(denoise, plan.level)
        check_rows(denoise, plan.to, plan.x0, plan.eps, plan.past)
        return True

    denoise, names = model.denoiser(model.params), [*model.published_solvers, *build.sampling.SOLVERS]
    return tuple(name for name in names if _passes(works, name))


def usable_tasks(model: DiffusionModel, solvers: Sequence[str]) -> tuple[str, ...]:
    """The tasks that this model can do with these solvers. One that only inpaints has no other task."""
    other_tasks = ("morph", "noise", "style") if INVERTIBLE in solvers else ("morph", "noise")
    return ("generate",) if model.network.known_channels else ("generate", *other_tasks)


def _passes(check, name: str) -> bool:
    try:
        return check(name)
    except ValueError:
        return False


def changed(config: ConfigDict, **values) -> ConfigDict:
    """The config with these values of config.sample. Another solver has its own options."""
    config = ConfigDict(config).copy_and_resolve_references()
    if values.get("solver", config.sample.solver) != config.sample.solver:
        values |= dict.fromkeys(build.sampling.OPTIONS)
    config.sample.update(values)
    return config


class Artist:
    """A model ready to draw repeatedly: weights on the devices, cached plans and conditions.

    config: the sections `sample` and `objective` are used.
    """

    def __init__(self, config: ConfigDict, model: DiffusionModel):
        self.in_turns = build.sampling.in_turns(config, model)
        self.config, self.model = config, model if self.in_turns else model.placed()
        if self.in_turns:
            model.conditioning.release()
        self.plan = functools.lru_cache(PLANS)(self._plan)
        self.prompt_conditions = functools.lru_cache(PROMPTS)(self._compute_prompt_conditions)
        self.sizes: dict[tuple[int, int], DiffusionModel] = {self.model.size: self.model}

    def of_size(self, size: tuple[int, int]) -> DiffusionModel:
        """The model for images of this size."""
        if size not in self.sizes:
            self.sizes[size] = self.model.resized(size)
        return self.sizes[size]

    def _plan(self, shared: Shared) -> tuple[Plan, Guidance]:
        """The plan, and the guidance without its scale and negative prompt. Raises ValueError for wrong settings."""
        config = changed(self.config, solver=shared.solver, spacing=shared.spacing, steps=shared.steps)
        config.sample.guidance = 1.0  # each picture has its own
        return build.sampling.plan_and_guidance(config, self.of_size(shared.size), shared.strength)

    def _compute_prompt_conditions(
        self, size: tuple[int, int], prompts: tuple[str, ...], negative_prompt: str
    ) -> list[PyTree]:
        """The conditions of the prompts, then that of the negative prompt, leaves (1, ...)."""
        conditioning = self.of_size(size).conditioning
        # in one call, so that all have the same length
        conds = conditioning.of_prompts([*prompts, negative_prompt] if negative_prompt else prompts)
        if self.in_turns:
            conditioning.release()
        parts = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], conds) for i in range(len(prompts) + 1)]
        if not negative_prompt:
            parts[-1] = jax.tree.map(lambda leaf: np.asarray(leaf)[None], repeat_texts(conditioning.null, parts[0]))
        return parts

    def conditions(self, picture: Picture) -> list[PyTree]:
        """The conditions of its prompt, for a morph also of the one it ends with, and of its negative prompt."""
        if picture.shared.task == "noise":
            return []
        ends = (picture.other_prompt,) if picture.shared.task == "morph" and picture.other_prompt else ()
        return self.prompt_conditions(picture.shared.size, (picture.prompt, *ends), picture.negative_prompt)

    def rows(self, shared: Shared) -> int:
        """How many steps the callback of `draw` counts."""
        rows = self.plan(shared)[0].num_rows
        return {"noise": 0, "style": 2 * rows}.get(shared.task, rows)

    def _source_condition(self, picture: Picture) -> PyTree:
        """The condition for the content of a picture to restyle; no condition if the request does not describe it."""
        cond, null = self.prompt_conditions(picture.shared.size, (picture.other_prompt or picture.prompt,), "")
        return cond if picture.other_prompt else null

    def shapes(self, picture: Picture) -> list[tuple[int, ...]]:
        """The shapes of its conditions: long prompts have longer ones, and are drawn apart."""
        return [np.shape(leaf) for leaf in jax.tree.leaves(self.conditions(picture))]

    def draw(self, pictures: Sequence[Picture], callback: Callback = None) -> Float[Array, "batch height width 3"]:
        """The images of a batch, in about [-1, 1].

        pictures: with one `shared`, of one `shapes`.
        callback: called after each step with (steps done, prediction of x0). Drawing stops if it returns True.
        Raises ValueError for settings that cannot be drawn.
        """
        shared = pictures[0].shared
        model, (plan, guidance) = self.of_size(shared.size), self.plan(shared)
        keys = _keys(picture.seed for picture in pictures)
        images = np.stack([picture.image for picture in pictures]) if shared.image else None
        if shared.task == "noise":
            return _noised(model, images, keys, [picture.weight for picture in pictures])
        cond, *end, negative = jax.tree.map(lambda *leaves: np.concatenate(leaves), *map(self.conditions, pictures))
        references = zip(*(picture.references for picture in pictures), strict=True)
        cond = with_references(model, cond, [*map(np.stack, references)])
        scales = np.array([picture.guidance for picture in pictures], np.float32)
        arguments = (cond, keys, plan, guidance._replace(scale=scales, negative=negative), Every(1, callback))
        match shared:
            case Shared(task="style"):
                source_conds = [self._source_condition(picture) for picture in pictures]
                source_cond = jax.tree.map(lambda *leaves: np.concatenate(leaves), *source_conds)
                return _restyled(model, images, source_cond, *arguments[:-1], callback)
            case Shared(task="morph"):
                weights = np.array([picture.weight for picture in pictures], np.float32)
                other_keys = _keys(picture.other_seed for picture in pictures)
                x = variations(model, keys, other_keys, plan, weights)
                cond = mix(cond, *end, weights) if end else cond
                return from_noise(model, x, cond, *arguments[1:])
            case Shared(mask=True):
                masks = np.stack([picture.mask for picture in pictures])
                return inpaint(model, images, masks, *arguments)
            case Shared(image=True):
                return image_to_image(model, images, *arguments)
        return text_to_image(model, *arguments)


def _keys(seeds) -> Array:
    return jax.vmap(jax.random.key)(np.array([*seeds], np.uint32))


def _noised(model: DiffusionModel, images: np.ndarray, keys: Array, weights: Sequence[float]) -> Array:
    """The images under noise, each at its part of the schedule's time."""
    schedule = model.schedule
    level = schedule(schedule.at(np.array(weights)))
    level = jax.tree.map(np.float32, level)
    return decode(model, add_noise(encode(model, images), noise(model, keys), level))


def _restyled(
    model: DiffusionModel,
    images: np.ndarray,
    source_cond: PyTree,
    cond: PyTree,
    keys: Array,
    plan: Plan,
    guidance: Guidance,
    callback: Callback,
) -> Array:
    """Invert the images to noise by DDIM, given what they show. Sample from this noise with another prompt.

    source_cond: the condition of what the images show.
    plan: `ddim`; its times are those of the inversion.
    """
    if plan.num_rows == 0:
        return image_to_image(model, images, cond, keys, plan)
    inversion = solvers.ddim_inversion(model.useful_schedule, plan.num_rows, plan.level.t)
    stopped = False

    def up(done: int, x0: Array) -> bool:
        nonlocal stopped
        stopped = bool(callback and callback(done, x0))
        return stopped

    def down(done: int, x0: Array) -> bool | None:
        return callback and callback(inversion.num_rows + done, x0)

    x = invert(model, images, source_cond, inversion, callback=Every(1, up))
    return decode(model, x) if stopped else from_noise(model, x, cond, keys, plan, guidance, Every(1, down))
