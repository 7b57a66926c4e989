"""The forward process: noise levels, closed-form noising, and what a network's output means.

Everywhere x_t = alpha * x0 + sigma * eps (Kingma et al. 2021, "Variational Diffusion Models", eq. 1).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


class NoiseLevel(NamedTuple):
    """One point of the forward process, or an array of them.

    t: the time as the network sees it (steps 0..T-1 for the discrete schedules).
    alpha: scale of the data. sigma: standard deviation of the noise. All three have one shape: () or (B,).
    """

    t: ArrayLike
    alpha: ArrayLike
    sigma: ArrayLike

    @property
    def logsnr(self) -> ArrayLike:
        """Log signal-to-noise ratio, 2 log(alpha / sigma); infinite on clean data and on noise alone."""
        if isinstance(self.alpha, jax.Array):
            return 2 * (jnp.log(self.alpha) - jnp.log(self.sigma))
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha) - np.log(self.sigma))


class Prediction(NamedTuple):
    """What a denoiser says about x_t: the data x0 and the noise eps, tied by alpha * x0 + sigma * eps = x_t."""

    x0: Float[Array, "batch *shape"]
    eps: Float[Array, "batch *shape"]


def expand(scalar: ArrayLike, x: Array) -> Array:
    """Give `scalar`, () or (B,), trailing axes so that it broadcasts from the left against x (B, ...)."""
    scalar = jnp.asarray(scalar, jnp.float32)
    return scalar.reshape(scalar.shape + (1,) * (x.ndim - scalar.ndim)) if scalar.ndim else scalar


def add_noise(
    x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
) -> Float[Array, "batch *shape"]:
    """Forward noising in closed form, x_t = alpha x0 + sigma eps (Ho et al. 2020, eq. 4)."""
    return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def velocity(
    x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
) -> Float[Array, "batch *shape"]:
    """The v target, v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D)."""
    return expand(level.alpha, x0) * eps - expand(level.sigma, x0) * x0


def from_eps(x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel) -> Prediction:
    """The network says eps: x0 = (x_t - sigma eps) / alpha (Ho et al. 2020, eq. 15)."""
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    return Prediction(x0=(x_t - sigma * out) / alpha, eps=out)


def from_x0(x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel) -> Prediction:
    """The network says x0: eps = (x_t - alpha x0) / sigma."""
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    return Prediction(x0=out, eps=(x_t - alpha * out) / sigma)


def from_v(x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel) -> Prediction:
    """The network says v = alpha eps - sigma x0 (Salimans & Ho 2022, appendix D), for any alpha and sigma.

    x0 = (alpha x_t - sigma v) / (alpha^2 + sigma^2),  eps = (sigma x_t + alpha v) / (alpha^2 + sigma^2).
    """
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    norm = alpha**2 + sigma**2
    return Prediction(x0=(alpha * x_t - sigma * out) / norm, eps=(sigma * x_t + alpha * out) / norm)


def from_flow(x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel) -> Prediction:
    """The network says u = eps - x0, the velocity of rectified flow (Liu et al. 2022, eq. 1), for any alpha and sigma.

    x0 = (x_t - sigma u) / (alpha + sigma),  eps = (x_t + alpha u) / (alpha + sigma).
    """
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    norm = alpha + sigma
    return Prediction(x0=(x_t - sigma * out) / norm, eps=(x_t + alpha * out) / norm)


def from_edm(
    x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel, sigma_data: float = 0.5
) -> Prediction:
    """The network says F of x0 = c_skip x_t + c_out F on the edm schedule, alpha = 1 (Karras et al. 2022, table 1).

    c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),  c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2).
    The network's input is scaled too: see `edm_input`.
    """
    sigma = expand(level.sigma, x_t)
    norm = sigma**2 + sigma_data**2
    x0 = sigma_data**2 / norm * x_t + sigma * sigma_data / norm**0.5 * out
    return Prediction(x0=x0, eps=sigma / norm * x_t - sigma_data / norm**0.5 * out)


CONVERSIONS = {"eps": from_eps, "x0": from_x0, "v": from_v, "flow": from_flow}


def edm_input(
    x_t: Float[Array, "batch *shape"], sigma: ArrayLike, sigma_data: float = 0.5
) -> tuple[Float[Array, "batch *shape"], ArrayLike]:
    """What the network behind `from_edm` is given: c_in x_t, c_in = 1 / sqrt(sigma^2 + sigma_data^2), and the time
    c_noise = log(sigma) / 4 (Karras et al. 2022, table 1). sigma: () or (B,), the time of the edm schedule.
    """
    return x_t / (expand(sigma, x_t) ** 2 + sigma_data**2) ** 0.5, jnp.log(sigma) / 4


def snr(level: NoiseLevel) -> ArrayLike:
    """Signal-to-noise ratio, alpha^2 / sigma^2."""
    return (level.alpha / level.sigma) ** 2


def uniform_weight(level: NoiseLevel, prediction: str) -> Float[Array, "batch"]:
    """Weight 1 on the squared error of whatever the network predicts (L_simple, Ho et al. 2020, eq. 14)."""
    return jnp.ones_like(level.sigma)


def min_snr_weight(level: NoiseLevel, prediction: str, gamma: float = 5.0) -> Float[Array, "batch"]:
    """min(SNR, gamma) on the x0 error, written on the error of the prediction (Hang et al. 2023, section 3.4).

    In alpha and sigma rather than in SNR, so that x0 and v weights stay finite at zero terminal SNR (alpha = 0).
    """
    clipped = jnp.minimum(level.alpha**2, gamma * level.sigma**2)  # min(SNR, gamma) sigma^2
    return _on_prediction(clipped, level, prediction)


def truncated_snr_weight(level: NoiseLevel, prediction: str) -> Float[Array, "batch"]:
    """max(SNR, 1) on the x0 error, written on the error of the prediction (Salimans & Ho 2022, section 4)."""
    return _on_prediction(jnp.maximum(level.alpha**2, level.sigma**2), level, prediction)


def _on_prediction(weight_sigma2: Array, level: NoiseLevel, prediction: str) -> Array:
    """From a weight on the x0 error, times sigma^2, to the weight on the prediction's error.

    |x0 error|^2 = |eps error|^2 / SNR = sigma^2 / (alpha^2 + sigma^2)^2 |v error|^2 = sigma^2 / (alpha + sigma)^2 |u
    error|^2
    """
    alpha2, sigma2 = level.alpha**2, level.sigma**2
    match prediction:
        case "eps":
            return weight_sigma2 / alpha2
        case "x0":
            return weight_sigma2 / sigma2
        case "v":
            return weight_sigma2 / (alpha2 + sigma2) ** 2
        case "flow":
            return weight_sigma2 / (level.alpha + level.sigma) ** 2
    raise ValueError(f"unknown prediction {prediction!r}: one of 'eps', 'x0', 'v', 'flow'")
