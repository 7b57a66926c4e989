"""Guidance: functions denoiser -> denoiser. A guided denoiser works with every solver, unless noted.

denoise: in every function here, the denoiser to guide.

Levels are () or (B,), so guidance also works inside a loss that has one noise level for each image.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from diffusion_jax.core.denoiser import Denoise, as_pytree
from diffusion_jax.core.process import NoiseLevel, Prediction, expand

To = NoiseLevel | None  # where the caller goes next, see `core.denoiser`


class Guidance(NamedTuple):
    """How strongly, and where, sampling follows the condition. The fields are named after the functions of this module.

    scale: () or (B,). 1 is no guidance.
    negative: condition to move away from, instead of "no condition". Leaves with or without the batch axis.
    rescale: in [0, 1]. How much of the contrast of the unguided image is kept.
    interval: (low, high). Guide only where low < sigma / alpha <= high; None for everywhere.
    cfg_pp: use CFG++, which adds back the unguided noise. Needs a scale in [0, 1] and a plan of one row a step.
    dynamic_threshold: percentile in [0, 1], for pixel models. None clips x0 instead.
    """

    scale: float | Float[Array, "batch"] = 1.0
    negative: PyTree = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    cfg_pp: bool = False
    dynamic_threshold: float | None = None


def guided(denoise: Denoise, guidance: Guidance, null_cond: PyTree, limit: float | None = None) -> Denoise:
    """Apply all settings of `guidance` to the denoiser.

    null_cond: the model's "no condition".
    limit: clip x0 to [-limit, limit]. None does not clip, as for latents.
    Raises ValueError for numbers out of range and for options that cannot be combined.
    """
    null_cond = null_cond if guidance.negative is None else guidance.negative
    if guidance.cfg_pp and guidance.rescale:
        raise ValueError("CFG++ and rescaled guidance exclude each other: remove one of them")
    if guidance.dynamic_threshold is not None and limit is None:
        raise ValueError("dynamic thresholding is for models of pixels; this model generates latents, without a limit")
    plain = as_pytree(denoise)
    if guidance.cfg_pp:
        denoise = cfg_pp(plain, guidance.scale, null_cond)
    elif guidance.rescale:
        denoise = rescale(plain, guidance.scale, null_cond, guidance.rescale)
    else:
        denoise = classifier_free(plain, guidance.scale, null_cond)
    if not jax.tree.leaves(null_cond):  # an unconditional model has nothing to be guided by
        denoise = plain
    if guidance.interval is not None:
        denoise = interval(denoise, plain, *guidance.interval)
    if guidance.dynamic_threshold is not None:
        return dynamic_threshold(denoise, guidance.dynamic_threshold, limit)
    return denoise if limit is None else clip_x0(denoise, limit)


def _checked_number(value: ArrayLike, name: str, low: float = 0.0, high: float = np.inf) -> Array:
    """Convert value, () or (B,), to float32. Raise ValueError outside [low, high], unless it is traced."""
    if not isinstance(value, jax.core.Tracer) and not np.all((np.asarray(value) >= low) & (np.asarray(value) <= high)):
        bounds = f"at least {low:g}" if high == np.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return jnp.asarray(value, jnp.float32)


def classifier_free(denoise: Denoise, scale: ArrayLike, null_cond: PyTree) -> Denoise:
    """Classifier-free guidance (Ho & Salimans 2022): null + scale * (conditional - null), for x0 and for eps.

    One call of the network computes both branches, on a batch of 2B. The two branches of an image are adjacent, so a
    batch split over devices needs no communication. A scale known to be 1 or 0 runs only the branch that it needs.

    scale: () or (B,). 1 is no guidance, more than 1 follows the condition more closely.
    null_cond: the model's "no condition", or a negative prompt. Leaves as those of cond, with or without the batch
      axis. Both branches share the leaves of cond that null_cond lacks, such as the known part of an image.
    """
    scale_array = _checked_number(scale, "guidance")
    if _is_all(scale, 1.0):
        return as_pytree(denoise)
    if _is_all(scale, 0.0):
        return Partial(_unconditional, as_pytree(denoise), null_cond)
    return Partial(_classifier_free, as_pytree(denoise), scale_array, null_cond)


def _is_all(value: ArrayLike, number: float) -> bool:
    """Whether the value is known and equals `number` for every image."""
    return not isinstance(value, jax.core.Tracer) and bool(np.all(np.asarray(value) == number))


def _unconditional(
    denoise: Denoise, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    return denoise(x, level, _without_condition(cond, null_cond), to=to)


def _classifier_free(
    denoise: Denoise, scale: Array, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    conditional, null = _predict_both(denoise, null_cond, x, level, cond, to)
    return _extrapolate(null, conditional, scale, x)


def _without_condition(cond: PyTree, null_cond: PyTree) -> PyTree:
    """cond with its leaves replaced by those of null_cond, broadcast to the shapes of cond."""
    null_cond = completed(null_cond, cond)
    return jax.tree.map(lambda leaf, null: jnp.broadcast_to(null, leaf.shape).astype(leaf.dtype), cond, null_cond)


def completed(null_cond: PyTree, cond: PyTree) -> PyTree:
    """null_cond, completed by the leaves of cond that it lacks. Dropping the condition leaves these unchanged."""
    return cond | null_cond if isinstance(cond, dict) else null_cond


def _predict_both(
    denoise: Denoise, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree, to: To
) -> tuple[Prediction, Prediction]:
    """The predictions with the condition and without it, from one call of the network."""

    def interleave(a: Array, b: Array) -> Array:
        return jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])

    level, to = jax.tree.map(lambda value: jnp.repeat(value, 2) if jnp.ndim(value) else value, (level, to))
    both = denoise(interleave(x, x), level, jax.tree.map(interleave, cond, _without_condition(cond, null_cond)), to=to)
    pairs = jax.tree.map(lambda out: out.reshape(-1, 2, *out.shape[1:]), both)
    return jax.tree.map(lambda out: out[:, 0], pairs), jax.tree.map(lambda out: out[:, 1], pairs)


def _extrapolate(start: Prediction, end: Prediction, scale: Array, x: Array) -> Prediction:
    """start + scale * (end - start)."""
    return jax.tree.map(lambda a, b: a + expand(scale, x) * (b - a), start, end)


def _replace_x0(prediction: Prediction, x0: Array, level: NoiseLevel) -> Prediction:
    """Replace x0, and adjust eps so that alpha x0 + sigma eps does not change."""
    alpha, sigma = expand(level.alpha, x0), expand(level.sigma, x0)
    return Prediction(x0=x0, eps=prediction.eps + alpha / sigma * (prediction.x0 - x0))


def rescale(denoise: Denoise, scale: ArrayLike, null_cond: PyTree, phi: float = 0.7) -> Denoise:
    """Classifier-free guidance that keeps the contrast of the conditional x0 (Lin et al. 2023, eq. 15 and 16).

        x0 = phi x0_guided std(x0_conditional) / std(x0_guided) + (1 - phi) x0_guided,   with std over each image

    scale, null_cond: as in `classifier_free`.
    phi: in [0, 1]. 0 is plain guidance.
    """
    scale_array, phi_array = _checked_number(scale, "guidance"), _checked_number(phi, "rescale's phi", high=1.0)
    if _is_all(scale, 1.0):
        return as_pytree(denoise)
    return Partial(_rescale, as_pytree(denoise), scale_array, null_cond, phi_array)


def _rescale(
    denoise: Denoise,
    scale: Array,
    null_cond: PyTree,
    phi: Array,
    x: Array,
    level: NoiseLevel,
    cond: PyTree,
    to: To = None,
) -> Prediction:
    conditional, null = _predict_both(denoise, null_cond, x, level, cond, to)
    guided = _extrapolate(null, conditional, scale, x)
    axes = tuple(range(1, x.ndim))
    ratio = jnp.std(conditional.x0, axes, keepdims=True) / jnp.maximum(jnp.std(guided.x0, axes, keepdims=True), 1e-8)
    return _replace_x0(guided, guided.x0 * (phi * ratio + 1 - phi), level)


def cfg_pp(denoise: Denoise, scale: ArrayLike, null_cond: PyTree) -> Denoise:
    """CFG++ (Chung et al. 2024, algorithm 2): x0 is guided; the noise that is added back is the unconditional one.

        x0 = null + scale (conditional - null),   eps = null

    The pair no longer satisfies alpha x0 + sigma eps = x. Use it with ddim and euler, whose steps are alpha' x0 +
    sigma' eps.

    scale: in [0, 1].
    null_cond: as in `classifier_free`.
    """
    scale_array = _checked_number(scale, "the scale of CFG++", high=1.0)
    if _is_all(scale, 0.0):
        return Partial(_unconditional, as_pytree(denoise), null_cond)
    return Partial(_cfg_pp, as_pytree(denoise), scale_array, null_cond)


def _cfg_pp(
    denoise: Denoise, scale: Array, null_cond: PyTree, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    conditional, null = _predict_both(denoise, null_cond, x, level, cond, to)
    return null._replace(x0=_extrapolate(null, conditional, scale, x).x0)


def autoguidance(denoise: Denoise, weaker: Denoise, scale: ArrayLike) -> Denoise:
    """Guidance away from a weaker model of the same kind (Karras et al. 2024): weaker + scale (denoise - weaker).

    weaker: a smaller or less trained denoiser, given the same condition.
    scale: 1 is no guidance.
    """
    return Partial(_autoguidance, as_pytree(denoise), as_pytree(weaker), _checked_number(scale, "guidance"))


def _autoguidance(
    denoise: Denoise, weaker: Denoise, scale: Array, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    return _extrapolate(weaker(x, level, cond, to=to), denoise(x, level, cond, to=to), scale, x)


def interval(guided: Denoise, plain: Denoise, low: float, high: float) -> Denoise:
    """Guidance at some noise levels only (Kynkäänniemi et al. 2024).

    guided: the denoiser where low < sigma / alpha <= high.
    plain: the denoiser without guidance, for all other levels. There the network runs once instead of twice, unless
      each image has its own level.
    low, high: 0 <= low < high.
    Raises ValueError for any other interval.
    """
    if not 0 <= low < high:
        raise ValueError(f"a guidance interval must have 0 <= low < high, got {low} and {high}")
    return Partial(_interval, as_pytree(guided), as_pytree(plain), jnp.float32(low), jnp.float32(high))


def _interval(
    guided: Denoise, plain: Denoise, low: Array, high: Array, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    noise = jnp.divide(level.sigma, level.alpha)  # infinite for pure noise: inside an interval up to infinity
    inside = (noise > low) & (noise <= high)
    if jnp.ndim(inside):
        both = guided(x, level, cond, to=to), plain(x, level, cond, to=to)
        return jax.tree.map(lambda a, b: jnp.where(inside.reshape(-1, *[1] * (x.ndim - 1)), a, b), *both)
    return jax.lax.cond(inside, lambda: guided(x, level, cond, to=to), lambda: plain(x, level, cond, to=to))


def clip_x0(denoise: Denoise, limit: float = 1.0) -> Denoise:
    """Clip the predicted x0, and adjust eps to match (the sampler of Ho et al. 2020). For pixel models.

    limit: x0 is clipped to [-limit, limit].
    """
    return Partial(_clip_x0, as_pytree(denoise), _checked_number(limit, "the limit of x0"))


def _clip_x0(denoise: Denoise, limit: Array, x: Array, level: NoiseLevel, cond: PyTree, to: To = None) -> Prediction:
    prediction = denoise(x, level, cond, to=to)
    return _replace_x0(prediction, jnp.clip(prediction.x0, -limit, limit), level)


def dynamic_threshold(denoise: Denoise, percentile: float = 0.995, limit: float = 1.0) -> Denoise:
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): x0 = clip(x0, -s, s) limit / s. For pixel models.

    percentile: in [0, 1]. s is this quantile of |x0| over each image, and at least limit.
    limit: pixels are in [-limit, limit].
    """
    quantile = _checked_number(percentile, "the percentile of dynamic thresholding", high=1.0)
    return Partial(_dynamic_threshold, as_pytree(denoise), quantile, _checked_number(limit, "the limit of x0"))


def _dynamic_threshold(
    denoise: Denoise, percentile: Array, limit: Array, x: Array, level: NoiseLevel, cond: PyTree, to: To = None
) -> Prediction:
    prediction = denoise(x, level, cond, to=to)
    quantile = jnp.quantile(jnp.abs(prediction.x0).reshape(len(x), -1), percentile, axis=1)
    s = expand(jnp.maximum(quantile, limit), x)
    return _replace_x0(prediction, jnp.clip(prediction.x0, -s, s) * limit / s, level)
