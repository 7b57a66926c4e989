"""A trained model ready to sample from, how strongly it is guided, and the one path from noise to pixels."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.guidance import (
    Denoise,
    as_pytree,
    cfg_pp,
    classifier_free,
    clip_x0,
    dynamic_threshold,
    interval,
    rescale,
)
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.sampling import Known, denoiser, initial_noise, sample
from diffusion_jax.core.solvers import Plan
from diffusion_jax.pipelines.codec import Codec, Images


class Pipeline(NamedTuple):
    """A trained model, ready to sample from.

    apply: (params, x (B, h, w, c), t (B,), cond) -> output. params: its weights. convert: `process.from_eps`, `from_x0`
    or `from_v`.
    codec: x0 -> image. null_cond: no condition, leaves without the batch axis. size: height and width of an image in
    pixels. fills: whether the network sees the known part of an image too, as cond["known"]; see `inpaint`.
    """

    apply: Callable[..., Array]
    params: PyTree
    convert: Callable[[Array, Array, NoiseLevel], Prediction]
    codec: Codec
    null_cond: PyTree
    size: tuple[int, int]
    fills: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of the x0 of one image."""
        height, width = self.size
        return height // self.codec.factor, width // self.codec.factor, self.codec.channels


class Guidance(NamedTuple):
    """How the condition is followed; see `core.guidance` for the formulas.

    scale: 1 for no guidance; one number or (B,).
    negative: a condition to lead away from instead of the model's null_cond, leaves with or without the batch axis.
    phi: in [0, 1], how much of the contrast of the unguided image is kept (`rescale`).
    limits: (low, high), guide only where low < sigma / alpha <= high (`interval`); None for everywhere.
    plus_plus: put the unguided noise back (`cfg_pp`, scale in [0, 1]), for plans of one row a step.
    percentile: of dynamic thresholding, for models of pixels; None clips them instead.
    """

    scale: float | Float[Array, "batch"] = 1.0
    negative: PyTree = None
    phi: float = 0.0
    limits: tuple[float, float] | None = None
    plus_plus: bool = False
    percentile: float | None = None


Guided = Guidance | float | Float[Array, "batch"]


def guided(denoise: Denoise, guidance: Guided, null_cond: PyTree, limit: float | None = None) -> Denoise:
    """The denoiser as `guidance`, or a bare scale, asks for.

    null_cond: the model's "no condition". limit: x0 is kept within [-limit, limit]; None where nothing is known of it.
    Raises ValueError for numbers out of range and for choices that exclude each other.
    """
    scale, negative, phi, limits, plus_plus, percentile = _as_guidance(guidance)
    null_cond = null_cond if negative is None else negative
    if plus_plus and phi:
        raise ValueError("CFG++ and rescaled guidance exclude each other: leave one out")
    if percentile is not None and limit is None:
        raise ValueError("dynamic thresholding is for models of pixels; this model's latents have no limit")
    plain = denoise = as_pytree(denoise)
    if plus_plus:
        denoise = cfg_pp(plain, scale, null_cond)
    elif phi:
        denoise = rescale(plain, scale, null_cond, phi)
    else:
        denoise = classifier_free(plain, scale, null_cond)
    if not jax.tree.leaves(null_cond):  # no condition, nothing to lead away from
        denoise = plain
    if limits is not None:
        denoise = interval(denoise, plain, *limits)
    if percentile is not None:
        return dynamic_threshold(denoise, percentile, limit)
    return denoise if limit is None else clip_x0(denoise, limit)


def _as_guidance(guidance: Guided) -> Guidance:
    return guidance if isinstance(guidance, Guidance) else Guidance(guidance)


def encode(pipeline: Pipeline, image: Images) -> Float[Array, "batch h w c"]:
    """The x0 of images, uint8 or in [-1, 1]; of an autoencoder, the mean of what it says.

    Raises ValueError for images of another size than the model's.
    """
    (height, width), codec = pipeline.size, pipeline.codec
    if image.shape[1:3] != (height, width):
        raise ValueError(f"this model's images are {width}x{height} pixels, got {image.shape[2]}x{image.shape[1]}")
    return jnp.asarray(codec.draw(codec.stats, codec.encode(image), None))


def noise(pipeline: Pipeline, keys: Key[Array, "batch"], level: NoiseLevel) -> Float[Array, "batch h w c"]:
    """The noise that images of these keys start from at a level, `plan.start`."""
    return initial_noise(keys, pipeline.shape, level)


def solve(
    pipeline: Pipeline,
    x: Float[Array, "batch h w c"],
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: Guided = 1.0,
    known: Known | None = None,
    **options,
) -> Float[Array, "batch h w c"]:
    """Carry x from the plan's first level to its last, spread over this host's devices when B divides by their number.

    cond: leaves (B, ...), of whatever kind the model was trained with; a text may be several times as long as that of
    the model's null condition, which is then repeated. keys: (B,), one for each image; an image depends on its key and
    condition, not on the batch. known: see `core.sampling.keep`. options: chunk and callback of `core.sampling.sample`.
    Raises ValueError for a model that fills in, whose condition does not say what is known.
    """
    if pipeline.fills and "known" not in cond:
        raise ValueError("this model fills in parts of an image: it needs an image and a mask")
    guidance = _as_guidance(guidance)
    split, whole = placements(len(keys))
    x, cond, keys, known = jax.device_put((x, cond, keys, known), split)
    params, null_cond, negative = jax.device_put((pipeline.params, pipeline.null_cond, guidance.negative), whole)
    null_cond, negative = (_null(part, cond) for part in (null_cond, negative))
    network = denoiser(pipeline.apply, params, pipeline.convert)
    denoise = guided(network, guidance._replace(negative=negative), null_cond, pipeline.codec.limit)
    if guidance.plus_plus and np.any(plan.past):
        raise ValueError("CFG++ needs a solver of one row a step: ddim or euler")
    return sample(denoise, plan, x, keys, cond, known=known, **options)


def _null(null_cond: PyTree, cond: PyTree) -> PyTree:
    """What stands for no condition, as long as cond is, and with what cond knows of the image."""
    if null_cond is None:
        return None

    def lengthened(null: Array, leaf: Array) -> Array:
        repeats = leaf.shape[1] // len(null) if null.ndim and null.ndim == leaf.ndim - 1 else 1
        return jnp.concatenate([null] * repeats) if repeats > 1 else null

    shared = {name: leaf for name, leaf in cond.items() if name == "known"}
    return {name: lengthened(null, cond[name]) for name, null in null_cond.items()} | shared


def decode(pipeline: Pipeline, x0: Float[Array, "batch h w c"]) -> Float[Array, "batch height width 3"]:
    """The images of x0, in about [-1, 1]."""
    split, whole = placements(len(x0))
    params = jax.device_put(pipeline.codec.params, whole)
    return jax.jit(pipeline.codec.decode)(params, jax.device_put(x0, split))


def from_noise(
    pipeline: Pipeline,
    x: Float[Array, "batch h w c"],
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: Guided = 1.0,
    **options,
) -> Float[Array, "batch height width 3"]:
    """Images in about [-1, 1] from the state x at `plan.start`: noise, or an image part of the way to it.

    All else as in `solve`.
    """
    return decode(pipeline, solve(pipeline, x, cond, keys, plan, guidance, **options))


def placements(batch: int) -> tuple[Sharding, Sharding]:
    """Where arrays with a batch axis go, and arrays that every device needs whole."""
    devices = jax.local_devices()
    if len(devices) == 1 or batch % len(devices):
        alone = SingleDeviceSharding(devices[0])
        return alone, alone
    mesh = Mesh(np.array(devices), ("data",))
    return NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
