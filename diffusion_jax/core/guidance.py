"""Guidance: denoiser -> denoiser. Nothing here touches a solver."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from diffusion_jax.core.process import NoiseLevel, Prediction, expand

Denoise = Callable[[Array, NoiseLevel, PyTree], Prediction]


def as_pytree(denoise: Denoise) -> Denoise:
    """A denoiser that can be an argument of a compiled function: a pytree as it is, a plain function wrapped."""
    return Partial(denoise) if jax.tree_util.all_leaves([denoise]) else denoise


def _number(value: ArrayLike, name: str, low: float = 0.0, high: float = np.inf) -> Array:
    """value as float32, () or (B,); outside [low, high] it raises, unless it is traced."""
    if not isinstance(value, jax.core.Tracer) and not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
        bounds = f"at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return jnp.asarray(value, jnp.float32)


def classifier_free(denoise: Denoise, scale: ArrayLike, null_cond: PyTree) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), on x0 and eps alike.

    scale: 1 is no guidance, above 1 more of the condition; one number or one for each image, (B,).
    null_cond: what stands for "no condition", or a negative prompt; leaves as those of cond, with or without the batch
    axis. Both branches run in one call of the network, on a batch of 2B in which an image's two branches are
    neighbours, so that a batch split over devices stays where it is.
    """
    return Partial(_classifier_free, as_pytree(denoise), _number(scale, "guidance"), null_cond)


def _classifier_free(
    denoise: Denoise, scale: Array, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    conditional, null = _both(denoise, null_cond, x, level, cond)
    return _extrapolate(null, conditional, scale, x)


def _both(
    denoise: Denoise, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree
) -> tuple[Prediction, Prediction]:
    """The predictions with the condition and without it, from one call of the network."""

    def interleave(a: Array, b: Array) -> Array:
        return jnp.stack([a, jnp.broadcast_to(b, a.shape).astype(a.dtype)], axis=1).reshape(-1, *a.shape[1:])

    both = denoise(interleave(x, x), level, jax.tree.map(interleave, cond, null_cond))
    pairs = jax.tree.map(lambda out: out.reshape(-1, 2, *out.shape[1:]), both)
    return jax.tree.map(lambda out: out[:, 0], pairs), jax.tree.map(lambda out: out[:, 1], pairs)


def _extrapolate(start: Prediction, end: Prediction, scale: Array, x: Array) -> Prediction:
    """start + scale * (end - start)."""
    return jax.tree.map(lambda a, b: a + expand(scale, x) * (b - a), start, end)


def _with_x0(prediction: Prediction, x0: Array, level: NoiseLevel) -> Prediction:
    """The prediction with another x0, and eps moved so that alpha x0 + sigma eps stays what it was."""
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    return Prediction(x0=x0, eps=prediction.eps + alpha / sigma * (prediction.x0 - x0))


def rescale(denoise: Denoise, scale: ArrayLike, null_cond: PyTree, phi: float = 0.7) -> Denoise:
    """Classifier-free guidance whose x0 keeps the contrast of the conditional one (Lin et al. 2023, eq. 15 and 16).

    x0 = phi x0_guided std(x0_conditional) / std(x0_guided) + (1 - phi) x0_guided, the deviations over each image.
    scale, null_cond: as in `classifier_free`. phi: in [0, 1], 0 is plain guidance.
    """
    return Partial(
        _rescale, as_pytree(denoise), _number(scale, "guidance"), null_cond, _number(phi, "rescale's phi", high=1.0)
    )


def _rescale(
    denoise: Denoise, scale: Array, null_cond: PyTree, phi: Array, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    conditional, null = _both(denoise, null_cond, x, level, cond)
    guided = _extrapolate(null, conditional, scale, x)
    axes = tuple(range(1, x.ndim))
    ratio = jnp.std(conditional.x0, axes, keepdims=True) / jnp.maximum(jnp.std(guided.x0, axes, keepdims=True), 1e-8)
    return _with_x0(guided, guided.x0 * (phi * ratio + 1 - phi), level)


def cfg_pp(denoise: Denoise, scale: ArrayLike, null_cond: PyTree) -> Denoise:
    """CFG++ (Chung et al. 2024, algorithm 2): x0 is guided, the noise that is put back is the unconditional one.

    x0 = null + scale (conditional - null), eps = null.  scale: in [0, 1]. The pair is not tied to x: meant for ddim and
    euler, whose steps are alpha' x0 + sigma' eps.
    """
    return Partial(_cfg_pp, as_pytree(denoise), _number(scale, "the scale of CFG++", high=1.0), null_cond)


def _cfg_pp(denoise: Denoise, scale: Array, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree) -> Prediction:
    conditional, null = _both(denoise, null_cond, x, level, cond)
    return null._replace(x0=_extrapolate(null, conditional, scale, x).x0)


def autoguidance(denoise: Denoise, weaker: Denoise, scale: ArrayLike) -> Denoise:
    """Guidance away from a weaker model of the same kind (Karras et al. 2024): weaker + scale (denoise - weaker).

    weaker: a smaller or less trained denoiser, given the same condition. scale: 1 is no guidance.
    """
    return Partial(_autoguidance, as_pytree(denoise), as_pytree(weaker), _number(scale, "guidance"))


def _autoguidance(
    denoise: Denoise, weaker: Denoise, scale: Array, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    return _extrapolate(weaker(x, level, cond), denoise(x, level, cond), scale, x)


def interval(guided: Denoise, plain: Denoise, low: float, high: float) -> Denoise:
    """Guidance at some noise levels only (Kynkäänniemi et al. 2024): `guided` where low < sigma / alpha <= high.

    plain: used elsewhere, the denoiser without guidance; there the network runs once and not twice.
    """
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval must have 0 <= low < high, got {low} and {high}")
    return Partial(_interval, as_pytree(guided), as_pytree(plain), jnp.float32(low), jnp.float32(high))


def _interval(
    guided: Denoise, plain: Denoise, low: Array, high: Array, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    inside = (level.sigma > low * level.alpha) & (level.sigma <= high * level.alpha)
    return jax.lax.cond(inside, guided, plain, x, level, cond)


def clip_x0(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """Keep the predicted x0 within [-limit, limit], and eps tied to it (the sampler of Ho et al. 2020, for pixels)."""
    return Partial(_clip_x0, as_pytree(denoise), _number(limit, "the limit of x0"))


def _clip_x0(denoise: Denoise, limit: Array, x: Array, level: NoiseLevel, cond: PyTree) -> Prediction:
    prediction = denoise(x, level, cond)
    return _with_x0(prediction, jnp.clip(prediction.x0, -limit, limit), level)


def dynamic_threshold(denoise: Denoise, percentile: float = 0.995, limit: float = 1.0) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x0 = clip(x0, -s, s) limit / s.

    s: the given quantile of |x0| of each image, at least limit. percentile: in [0, 1]. For pixels in [-limit, limit].
    """
    fraction = _number(percentile, "the percentile of dynamic thresholding", high=1.0)
    return Partial(_dynamic_threshold, as_pytree(denoise), fraction, _number(limit, "the limit of x0"))


def _dynamic_threshold(
    denoise: Denoise, percentile: Array, limit: Array, x: Array, level: NoiseLevel, cond: PyTree
) -> Prediction:
    prediction = denoise(x, level, cond)
    size = jnp.quantile(jnp.abs(prediction.x0).reshape(len(x), -1), percentile, axis=1)
    s = expand(jnp.maximum(size, limit), x)
    return _with_x0(prediction, jnp.clip(prediction.x0, -s, s) * limit / s, level)
