"""From noise to pixels: the common code of all pipelines."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax import parallel
from diffusion_jax.codec import Codec, Images
from diffusion_jax.core.denoiser import target_time
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.sampling import CHUNK, Known, initial_noise, sample
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel

GuidanceLike = Guidance | float | Float[Array, "batch"]
Callback = Callable[[int, Array], bool | None] | None


class Every(NamedTuple):
    """A callback that is called after every `rows` rows of the plan, instead of the default number."""

    rows: int
    callback: Callback


CallbackLike = Callback | Every


def encode(model: DiffusionModel, image: Images) -> Float[Array, "batch h w c"]:
    """The x0 of images, uint8 or in [-1, 1]. For an autoencoder, the mean of its posterior.

    Raises ValueError for images of another size than the model's.
    """
    height, width = model.size
    if image.shape[1:3] != (height, width):
        raise ValueError(f"this model's images are {width}x{height} pixels, got {image.shape[2]}x{image.shape[1]}")
    return encode_any(model.codec, image)


def encode_any(codec: Codec, image: Images) -> Float[Array, "batch h w c"]:
    """The x0 of images of any size that the codec can encode; see `encode`."""
    params = parallel.whole(codec.params, len(image))
    return jnp.asarray(codec.sample(codec.stats, codec.encode(params, image), None))


def noise(model: DiffusionModel, keys: Key[Array, "batch"], std: ArrayLike = 1.0) -> Float[Array, "batch h w c"]:
    """The initial noise of images.

    keys: (B,), one for each image.
    std: standard deviation, usually `plan.initial`.
    """
    return initial_noise(keys, model.shape, NoiseLevel(0.0, 0.0, std))


def solve(
    model: DiffusionModel,
    x: Float[Array, "batch h w c"],
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
    known: Known | None = None,
) -> Float[Array, "batch h w c"]:
    """Carry x from the plan's first level to its last.

    This host's devices share the batch if B is divisible by their number.

    cond: leaves (B, ...), of the kind that the model was trained with. A text may be several times as long as in the
      model's null condition, which is then repeated.
    keys: (B,), one for each image. An image depends on its key and condition, not on the batch.
    guidance: scale of classifier-free guidance, () or (B,), 1 for none; or a `Guidance`.
    callback: called with (rows done, prediction of x0) after each chunk of rows; `Every` sets the size of a chunk.
      Sampling stops if it returns True.
    known: for inpainting, the part of x to keep; see `core.sampling.keep`.
    Raises ValueError for an inpainting model without a known part in its condition, and the errors of
    `core.guidance.guided` and `core.sampling.sample`.
    """
    if model.network.known_channels and "known" not in cond:
        raise ValueError("this is an inpainting model: it needs an image and a mask")
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    cond, guidance = with_guidance_scale(model, cond, guidance)
    x, cond, keys, known = parallel.spread((x, cond, keys, known), len(keys))
    nulls = model.conditioning.null, guidance.negative
    params, (null_cond, negative) = parallel.whole((model.params, nulls), len(keys))
    null_cond, negative = (repeat_texts(null, cond) for null in (null_cond, negative))
    denoise = guided(model.denoiser(params), guidance._replace(negative=negative), null_cond, model.codec.limit)
    check_guidance(guidance, plan)
    rows, callback = callback if isinstance(callback, Every) else (CHUNK, callback)
    return sample(denoise, plan, x, keys, cond, chunk=rows, known=known, callback=callback)


def with_guidance_scale(model: DiffusionModel, cond: PyTree, guidance: Guidance) -> tuple[PyTree, Guidance]:
    """Move the guidance scale, and the interval, into the condition, for a network that takes them as input instead of
    being guided.
    """
    if not model.network.takes_scale:
        return cond, guidance
    count = len(jax.tree.leaves(cond)[0])
    inputs = {"guidance": jnp.broadcast_to(jnp.asarray(guidance.scale, jnp.float32), (count,))}
    if model.network.takes_interval:
        ends = NoiseLevel(0.0, 1.0, jnp.asarray(guidance.interval or (0.0, jnp.inf)))
        inputs["interval"] = jnp.tile(target_time(ends), (count, 1))
    return cond | inputs, Guidance()


def check_guidance(guidance: Guidance, plan: Plan) -> None:
    """Raise ValueError for a plan that does not support this guidance."""
    if guidance.cfg_pp and np.any(plan.past):
        raise ValueError("CFG++ needs a solver of one row a step: ddim or euler")


def repeat_texts(null_cond: PyTree, cond: PyTree) -> PyTree:
    """null_cond with its texts repeated to the length of those in cond."""

    def repeated(null: ArrayLike, leaf: ArrayLike) -> ArrayLike:
        repeats = leaf.shape[1] // len(null) if null.ndim and null.ndim == leaf.ndim - 1 else 1
        return jnp.concatenate([null] * repeats) if repeats > 1 else null

    return null_cond and {name: repeated(null, cond[name]) for name, null in null_cond.items()}


def decode(model: DiffusionModel, x0: Float[Array | np.ndarray, "batch h w c"]) -> Float[Array, "batch height width 3"]:
    """The images of x0, in about [-1, 1]."""
    params = parallel.whole(model.codec.params, len(x0))
    return jax.jit(model.codec.decode)(params, parallel.spread(x0, len(x0)))


def from_noise(
    model: DiffusionModel,
    x: Float[Array, "batch h w c"],
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
    known: Known | None = None,
) -> Float[Array, "batch height width 3"]:
    """Images in about [-1, 1] from the state x at `plan.start`: noise, or a partly denoised image.

    Other arguments as in `solve`.
    """
    return decode(model, solve(model, x, cond, keys, plan, guidance, callback, known))
