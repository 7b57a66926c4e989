"""Parameterizations: what a network is given, what it is trained to say, and what its answer means.

Every parameterization is linear in the pair (x0, eps): the network is trained to say

    out = p x0 + q eps,    and with    x_t = alpha x0 + sigma eps    two equations give the pair back.

    name    p                   q                     reference
    eps     0                   1                     Ho et al. 2020, eq. 14
    x0      1                   0
    v       -sigma              alpha                 Salimans & Ho 2022, appendix D
    flow    -1                  1                     Liu et al. 2022, eq. 1
    edm     sigma / (s n)       -s alpha / n          Karras et al. 2022, table 1

In edm s is sigma_data and n^2 = sigma^2 + s^2 alpha^2.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from diffusion_jax.core import process
from diffusion_jax.core.process import NoiseLevel, Prediction, expand
from diffusion_jax.core.schedules import NOISE_ALONE


def _as_it_is(x_t: Array, level: NoiseLevel) -> tuple[Array, ArrayLike]:
    return x_t, level.t


@dataclass(frozen=True)
class Parameterization:
    """One way for a network to speak about x_t. Levels are of () or (B,) everywhere.

    coefficients: level -> (p, q), what the network is trained to say of x0 and of eps.
    inputs: (x_t, level) -> (x, t), what the network is given.
    """

    coefficients: Callable[[NoiseLevel], tuple[ArrayLike, ArrayLike]]
    inputs: Callable[[Array, NoiseLevel], tuple[Array, ArrayLike]] = _as_it_is

    def target(
        self, x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
    ) -> Float[Array, "batch *shape"]:
        """What the network is trained to say: p x0 + q eps."""
        p, q = (expand(scalar, x0) for scalar in self.coefficients(level))
        return p * x0 + q * eps

    def predict(
        self, x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel
    ) -> Prediction:
        """What the network's answer means: the pair (x0, eps)."""
        return process.split(x_t, out, level, *self.coefficients(level))

    def magnification(self, level: NoiseLevel) -> ArrayLike:
        """How many times larger an error of the network's answer is as an error of x0: sigma / |alpha q - sigma p|."""
        p, q = self.coefficients(level)
        return level.sigma / abs(level.alpha * q - level.sigma * p)


eps = Parameterization(lambda level: (0.0, 1.0))
x0 = Parameterization(lambda level: (1.0, 0.0))
v = Parameterization(lambda level: (-level.sigma, level.alpha))
flow = Parameterization(lambda level: (-1.0, 1.0))
NAMED = {"eps": eps, "x0": x0, "v": v, "flow": flow}  # the words of configs and checkpoints


@functools.cache  # equal settings are one value, so that nothing recompiles
def edm(sigma_data: float = 0.5) -> Parameterization:
    """The preconditioning of Karras et al. 2022, table 1, written for any alpha; theirs is alpha = 1.

    The network says F of x0 = c_skip x_t + c_out F. It is given c_in x_t = x_t / n and c_noise =
    log(sigma / alpha) / 4, so that its input and its target have unit variance at every level. All levels that
    are noise alone share one time.

    sigma_data: standard deviation of the data, above 0.
    Raises ValueError for another sigma_data.
    """
    if not 0 < sigma_data < float("inf"):
        raise ValueError(f"edm needs a sigma_data above 0, the standard deviation of the data; got {sigma_data}")

    def norm(level: NoiseLevel) -> ArrayLike:
        return (level.sigma**2 + (sigma_data * level.alpha) ** 2) ** 0.5

    def coefficients(level: NoiseLevel) -> tuple[ArrayLike, ArrayLike]:
        return level.sigma / (sigma_data * norm(level)), -sigma_data * level.alpha / norm(level)

    def inputs(x_t: Array, level: NoiseLevel) -> tuple[Array, ArrayLike]:
        return x_t / expand(norm(level), x_t), jnp.log(jnp.minimum(level.sigma / level.alpha, NOISE_ALONE)) / 4

    return Parameterization(coefficients, inputs)
