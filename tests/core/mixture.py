"""A Gaussian mixture, whose denoiser is known in closed form for every noise level."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.process import Prediction

MEANS = np.array([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]])
STDS = np.array([0.3, 0.4, 0.2])
WEIGHTS = np.array([0.5, 0.3, 0.2])


def denoise(x, level, cond=None) -> Prediction:
    """E[x0 | x_t] for x (B, 2): posterior responsibilities times each Gaussian's posterior mean."""
    alpha, sigma = level.alpha, level.sigma
    variance = alpha**2 * STDS**2 + sigma**2
    residual = x[:, None] - alpha * MEANS
    log_density = jnp.log(WEIGHTS) - jnp.log(variance) - jnp.sum(residual**2, -1) / (2 * variance)
    posterior_means = MEANS + (alpha * STDS**2 / variance)[:, None] * residual
    x0 = jnp.einsum("bk,bkd->bd", jax.nn.softmax(log_density), posterior_means)
    return Prediction(x0=x0, eps=(x - alpha * x0) / sigma)


def moments() -> tuple[np.ndarray, np.ndarray]:
    """Mean (2,) and covariance (2, 2) of the mixture."""
    mean = WEIGHTS @ MEANS
    centred = MEANS - mean
    return mean, np.einsum("k,ki,kj->ij", WEIGHTS, centred, centred) + np.eye(2) * (WEIGHTS @ STDS**2)
