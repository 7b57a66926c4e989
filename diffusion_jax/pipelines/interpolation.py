"""Interpolation between two noises, two prompts or two seeds."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.process import expand
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import noise

Weight = float | Float[Array | np.ndarray, "batch"]


def slerp(
    a: Float[Array, "batch *shape"], b: Float[Array, "batch *shape"], weight: Weight
) -> Float[Array, "batch *shape"]:
    """Interpolate along the great circle from a to b (Shoemake 1985), which keeps the strength of noise.

        sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b,   theta the angle between a and b

    It is linear if they are parallel. Each image is one vector.

    a, b: (B, ...).

    weight: w, () or (B,). 0 gives a, 1 gives b.
    """
    axes = tuple(range(1, a.ndim))

    def norm(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))

    u, v = (x / jnp.maximum(norm(x), 1e-20) for x in (a, b))
    theta = 2 * jnp.arctan2(norm(u - v), norm(u + v))  # exact for small angles too (Kahan 2006, section 12)
    w = expand(weight, a)
    parallel = jnp.sin(theta) < 1e-4
    theta = jnp.where(parallel, 1.0, theta)
    on_a = jnp.where(parallel, 1 - w, jnp.sin((1 - w) * theta) / jnp.sin(theta))
    on_b = jnp.where(parallel, w, jnp.sin(w * theta) / jnp.sin(theta))
    return on_a * a + on_b * b


def mix(a: PyTree, b: PyTree, weight: Weight) -> PyTree:
    """Interpolate two conditions: (1 - weight) a + weight b for embeddings, "or" for masks.

    At weights 0 and 1 a mask is that of a and of b, so that a morph begins and ends with the images of its prompts.

    a, b: leaves (B, ...) of the same shapes, floats or bool masks.
    weight: () or (B,).
    Raises ValueError for leaves of other kinds, such as class labels.
    """

    def between(a: ArrayLike, b: ArrayLike) -> Array:
        a, b = jnp.asarray(a), jnp.asarray(b)
        w = expand(weight, a)
        if a.dtype == bool:
            return jnp.where(w == 0, a, jnp.where(w == 1, b, a | b))
        if not jnp.issubdtype(a.dtype, jnp.floating):
            raise ValueError(f"only embeddings can be mixed: expected floats or bool masks, got {a.dtype}")
        return (1 - w) * a + w * b

    return jax.tree.map(between, a, b)


def variations(
    model: DiffusionModel, keys: Key[Array, "batch"], other_keys: Key[Array, "batch"], plan: Plan, strength: Weight
) -> Float[Array, "batch h w c"]:
    """Noise for variations of images, for `from_noise`: between the noise of `keys` and that of `other_keys`.

    strength: () or (B,). 0 gives the images of `keys`, 1 those of `other_keys`.
    """
    return slerp(noise(model, keys, plan.initial), noise(model, other_keys, plan.initial), strength)
