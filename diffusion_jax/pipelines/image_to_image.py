"""Image and prompt -> image, and image -> its noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.codec import Images, pixels
from diffusion_jax.core.process import add_noise
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import CallbackLike, GuidanceLike, encode, from_noise, noise, solve


def image_to_image(
    model: DiffusionModel,
    image: Images,
    cond: PyTree,
    keys: Key[Array, "batch"],
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
) -> Float[Array, "batch height width 3"]:
    """Change an image: add noise up to `plan.start`, then denoise it (SDEdit, Meng et al. 2022, section 3).

    image: (B, H, W, 3), uint8 or in [-1, 1], of the model's size.
    plan: a solver on `solvers.strength_times(schedule, steps, strength)`. Strength 0 has no rows and returns the image
      unchanged. Strength 1 generates what `text_to_image` does, up to the remaining alpha at the noisiest time.
    Other arguments as in `text_to_image`.
    """
    if plan.num_rows == 0:
        return jnp.asarray(pixels(image))
    x = noised(model, encode(model, image), keys, plan)
    return from_noise(model, x, cond, keys, plan, guidance, callback)


def noised(
    model: DiffusionModel, x0: Float[Array, "batch h w c"], keys: Key[Array, "batch"], plan: Plan
) -> Float[Array, "batch h w c"]:
    """x0 with noise at the level `plan.start`."""
    return add_noise(x0, noise(model, keys), plan.start)


def invert(
    model: DiffusionModel,
    image: Images,
    cond: PyTree,
    plan: Plan,
    guidance: GuidanceLike = 1.0,
    callback: CallbackLike = None,
) -> Float[Array, "batch h w c"]:
    """The noise from which `ddim` generates the image (Song et al. 2021, section 4.3).

    `from_noise` with `ddim` on the same times and cond reconstructs the image. Another cond edits it. More steps and a
    guidance of 1 reconstruct it more closely.

    plan: `solvers.ddim_inversion`.
    Other arguments as in `image_to_image`.
    """
    unused_keys = jax.random.split(jax.random.key(0), len(image))  # the plan adds no noise
    return solve(model, encode(model, image), cond, unused_keys, plan, guidance, callback)
