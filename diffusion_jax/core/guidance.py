"""Guidance: denoiser -> denoiser. Nothing here touches a solver."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from diffusion_jax.core.process import NoiseLevel, Prediction, expand

Denoise = Callable[[Array, NoiseLevel, PyTree], Prediction]


def as_pytree(denoise: Denoise) -> Denoise:
    """A denoiser that can be an argument of a compiled function: a pytree as it is, a plain function wrapped."""
    return Partial(denoise) if jax.tree_util.all_leaves([denoise]) else denoise


def classifier_free(denoise: Denoise, scale: float | Float[Array, "batch"], null_cond: PyTree) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), on x0 and eps alike.

    scale: 1 is no guidance, above 1 more of the condition; one number or one for each image, (B,).
    null_cond: what stands for "no condition", or a negative prompt; leaves as those of cond, with or without the batch
    axis.
    Both branches run in one call of the network, on a batch of 2B in which an image's two branches are neighbours, so
    that
    a batch split over devices stays where it is.
    """
    return Partial(_classifier_free, as_pytree(denoise), jnp.asarray(scale, jnp.float32), null_cond)


def _classifier_free(
    denoise: Denoise, scale: Array, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    def interleave(a: Array, b: Array) -> Array:
        return jnp.stack([a, jnp.broadcast_to(b, a.shape).astype(a.dtype)], axis=1).reshape(-1, *a.shape[1:])

    both = denoise(interleave(x, x), level, jax.tree.map(interleave, cond, null_cond))
    strength = expand(scale, x)

    def combine(out: Array) -> Array:
        conditional, null = jnp.moveaxis(out.reshape(-1, 2, *out.shape[1:]), 1, 0)
        return null + strength * (conditional - null)

    return Prediction(*map(combine, both))


def clip_x0(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """Keep the predicted x0 within [-limit, limit], and eps tied to it (Ho et al. 2020's sampler, for pixels in [-1,
    1]).
    """
    return Partial(_clip_x0, as_pytree(denoise), jnp.asarray(limit, jnp.float32))


def _clip_x0(denoise: Denoise, limit: Array, x: Array, level: NoiseLevel, cond: PyTree) -> Prediction:
    prediction = denoise(x, level, cond)
    x0 = jnp.clip(prediction.x0, -limit, limit)
    alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
    return Prediction(x0=x0, eps=prediction.eps + alpha / sigma * (prediction.x0 - x0))
