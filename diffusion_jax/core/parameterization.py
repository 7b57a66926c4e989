"""Parameterizations: the network's input, its training target, and how its output becomes (x0, eps).

Every parameterization is linear in the pair (x0, eps). The network is trained to output

    out = p x0 + q eps,    and together with    x_t = alpha x0 + sigma eps    this determines the pair.

    name    p                   q                     reference
    eps     0                   1                     Ho et al. 2020, eq. 14
    x0      1                   0
    v       -sigma              alpha                 Salimans & Ho 2022, appendix D
    flow    -1                  1                     Liu et al. 2022, eq. 1
    edm     sigma / (s n)       -s alpha / n          Karras et al. 2022, table 1

In edm, s is sigma_data and n^2 = sigma^2 + s^2 alpha^2.
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


def _unchanged(x_t: Array, level: NoiseLevel) -> tuple[Array, ArrayLike]:
    return x_t, level.t


@dataclass(frozen=True)
class Parameterization:
    """What a network is given for x_t and what it predicts. Levels are () or (B,) everywhere.

    coefficients: level -> (p, q). The training target is p x0 + q eps.
    inputs: (x_t, level) -> (x, t). The network's input.
    """

    coefficients: Callable[[NoiseLevel], tuple[ArrayLike, ArrayLike]]
    inputs: Callable[[Array, NoiseLevel], tuple[Array, ArrayLike]] = _unchanged

    def target(
        self, x0: Float[Array, "batch *shape"], eps: Float[Array, "batch *shape"], level: NoiseLevel
    ) -> Float[Array, "batch *shape"]:
        """The training target, p x0 + q eps."""
        p, q = (expand(scalar, x0) for scalar in self.coefficients(level))
        return p * x0 + q * eps

    def predict(
        self, x_t: Float[Array, "batch *shape"], out: Float[Array, "batch *shape"], level: NoiseLevel
    ) -> Prediction:
        """Convert the network's output to the pair (x0, eps)."""
        return process.split(x_t, out, level, *self.coefficients(level))

    def step(self, level: NoiseLevel, to: NoiseLevel) -> tuple[ArrayLike, ArrayLike]:
        """(a, b) of the state at another level, alpha_to x0 + sigma_to eps = a x_t + b out."""
        p, q = self.coefficients(level)
        determinant = level.alpha * q - level.sigma * p
        a = (to.alpha * q - to.sigma * p) / determinant
        return a, (to.sigma * level.alpha - to.alpha * level.sigma) / determinant

    def magnification(self, level: NoiseLevel) -> ArrayLike:
        """Factor from an error in the network's output to the error in x0: sigma / |alpha q - sigma p|."""
        p, q = self.coefficients(level)
        return level.sigma / abs(level.alpha * q - level.sigma * p)


eps = Parameterization(lambda level: (0.0, 1.0))  # Ho et al. 2020, eq. 15
x0 = Parameterization(lambda level: (1.0, 0.0))
v = Parameterization(lambda level: (-level.sigma, level.alpha))  # Salimans & Ho 2022, appendix D
flow = Parameterization(lambda level: (-1.0, 1.0))
NAMED = {"eps": eps, "x0": x0, "v": v, "flow": flow}  # the names that configs and checkpoints use


@functools.cache  # equal settings give the same object, so nothing recompiles
def edm(sigma_data: float = 0.5) -> Parameterization:
    """The preconditioning of Karras et al. 2022, table 1, for any alpha; theirs is alpha = 1.

    The network predicts F in x0 = c_skip x_t + c_out F. Its input is c_in x_t = x_t / n and c_noise =
    log(sigma / alpha) / 4. Input and target then have unit variance at every level. All levels of pure noise share
    one time.

    sigma_data: standard deviation of the data, above 0.
    Raises ValueError for any other sigma_data.
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
