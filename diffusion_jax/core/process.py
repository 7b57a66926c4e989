"""The forward process: noise levels, closed-form noising, and the pair (x0, eps) that makes up a noisy image.

Everywhere x_t = alpha * x0 + sigma * eps (Kingma et al. 2021, "Variational Diffusion Models", eq. 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class NoiseLevel(NamedTuple):
    """One point of the forward process, or a batch of points. All fields have the same shape, () or (B,).

    t: the time as the network sees it (steps 0..T-1 for the discrete schedules).
    alpha: scale of the data.
    sigma: standard deviation of the noise.
    """

    t: ArrayLike
    alpha: ArrayLike
    sigma: ArrayLike

    @property
    def logsnr(self) -> ArrayLike:
        """Log signal-to-noise ratio, 2 log(alpha / sigma). Infinite for clean data and for pure noise."""
        if isinstance(self.alpha, jax.Array):
            return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))


CLEAN = NoiseLevel(0.0, 1.0, 0.0)  # clean data, where a step may go; its time means nothing


class Prediction(NamedTuple):
    """The output of a denoiser for x_t: the data x0 and the noise eps, tied by alpha * x0 + sigma * eps = x_t."""

    x0: Float[Array, "batch *shape"]
    eps: Float[Array, "batch *shape"]


def expand(scalar: ArrayLike, x: Array) -> Array:
    """Append axes to a scalar, () or (B,), so that it broadcasts against x (B, ...) along the batch."""
    scalar = jnp.asarray(scalar, jnp.float32)
    return scalar.reshape(scalar.shape + (1,) * (x.ndim - scalar.ndim)) if scalar.ndim else scalar


def add_noise(
    x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
) -> Float[Array, "batch *shape"]:
    """Add noise to data: x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4).

    x0: (B, ...), data.
    eps: (B, ...), standard normal noise.
    level: the noise level of each example, () or (B,).
    """
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def velocity(
    x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
) -> Float[Array, "batch *shape"]:
    """The v target, v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)."""
    return expand(level.alpha, x0) * eps - expand(level.sigma, x0) * x0


def split(
    x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel, p: ArrayLike, q: ArrayLike
) -> Prediction:
    """Solve alpha x0 + sigma eps = x_t and p x0 + q eps = out for (x0, eps), by Cramer's rule.

    p, q: () or (B,). Coefficients of x0 and eps in the network's output; see `core.parameterization`.
    """
    alpha, sigma, p, q = (expand(scalar, x_t) for scalar in (level.alpha, level.sigma, p, q))
    determinant = alpha * q - sigma * p
    return Prediction(x0=(q * x_t - sigma * out) / determinant, eps=(alpha * out - p * x_t) / determinant)


def snr(level: NoiseLevel) -> ArrayLike:
    """Signal-to-noise ratio, alpha^2 / sigma^2."""
    return (level.alpha / level.sigma) ** 2
