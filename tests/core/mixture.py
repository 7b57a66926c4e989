"""Gaussian mixtures, whose denoiser is known in closed form for every noise level."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.solvers import HISTORY, Plan


class Mixture(NamedTuple):
    """sum_k weights_k N(means_k, stds_k^2 I): means (K, D), stds and weights (K,)."""

    means: np.ndarray
    stds: np.ndarray
    weights: np.ndarray

    def denoise(self, x, level: NoiseLevel, cond=None) -> Prediction:
        """E[x0 | x_t] for x (B, D): posterior responsibilities times each Gaussian's posterior mean."""
        xp = jnp if isinstance(x, jax.Array) else np
        alpha, sigma = level.alpha, level.sigma
        variance = alpha**2 * self.stds**2 + sigma**2
        residual = x[:, None] - alpha * self.means
        dim = self.means.shape[1]
        log = xp.log(self.weights) - dim / 2 * xp.log(variance) - xp.sum(residual**2, -1) / (2 * variance)
        responsibility = (jax.nn.softmax if xp is jnp else scipy.special.softmax)(log, axis=1)
        posterior_means = self.means + (alpha * self.stds**2 / variance)[:, None] * residual
        x0 = xp.einsum("bk,bkd->bd", responsibility, posterior_means)
        return Prediction(x0=x0, eps=(x - alpha * x0) / sigma)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (D,) and covariance (D, D)."""
        mean = self.weights @ self.means
        centred = self.means - mean
        within = np.eye(len(mean)) * (self.weights @ self.stds**2)
        return mean, np.einsum("k,ki,kj->ij", self.weights, centred, centred) + within


PLANE = Mixture(
    means=np.array([[-1.5, 0.5], [1.0, 1.0], [0.5, -1.5]]),
    stds=np.array([0.3, 0.4, 0.2]),
    weights=np.array([0.5, 0.3, 0.2]),
)
HIGH = Mixture(
    means=np.random.default_rng(0).normal(size=(4, 64)) * 0.3,
    stds=np.array([0.5, 0.3, 0.4, 0.6]),
    weights=np.array([0.4, 0.3, 0.2, 0.1]),
)
denoise, moments = PLANE.denoise, PLANE.moments


def run(plan: Plan, x: np.ndarray, denoise, rows: int | None = None, noise: np.ndarray | None = None) -> np.ndarray:
    """What `sampling.sample` computes, written down again in numpy float64. noise: (R, *x.shape)."""
    past = [np.zeros_like(x)] * HISTORY
    for i in range(plan.num_rows if rows is None else rows):
        x0, eps = denoise(x, NoiseLevel(*(v[i] for v in plan.level)))
        x = plan.x0[i] * x0 + plan.eps[i] * eps + sum(c * d for c, d in zip(plan.past[i], past, strict=True))
        if noise is not None:
            x = x + plan.noise[i] * noise[i]
        past = [plan.memory[i, 0] * x0 + plan.memory[i, 1] * eps, *past[:-1]]
    return x
