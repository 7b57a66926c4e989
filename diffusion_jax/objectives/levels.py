"""The noise levels that training uses, and the weight of the error at each of them.

They are independent of the path of sampling: a model trained mostly at some log-SNR is still sampled along its whole
schedule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.process import NoiseLevel, snr
from diffusion_jax.core.schedules import Schedule

Levels = Callable[[Schedule, Key[Array, "batch"]], NoiseLevel]
Weight = Callable[[NoiseLevel, Parameterization], Float[Array, "batch"]]


def uniform(schedule: Schedule, keys: Key[Array, "batch"]) -> NoiseLevel:
    """Levels uniform in the schedule's time: a step in 0..T-1, or any time in [t_min, t_max] in continuous time."""

    def time(key: Key[Array, ""]) -> Array:
        if schedule.num_steps:
            return jax.random.randint(key, (), 0, schedule.num_steps)
        return jax.random.uniform(key, (), minval=schedule.t_min, maxval=schedule.t_max)

    return schedule(jax.vmap(time)(keys))


def even(schedule: Schedule, keys: Key[Array, "batch"]) -> NoiseLevel:
    """Levels as dense as the steps of a solver: uniform in the fraction of `Schedule.at`."""
    return schedule(schedule.at(jax.vmap(jax.random.uniform)(keys)))


def laplace(schedule: Schedule, keys: Key[Array, "batch"], mean: float = 0.0, scale: float = 0.5) -> NoiseLevel:
    """Log-SNR from a Laplace distribution, dense around equal parts of image and noise (Hang et al. 2024, table 1).

    mean, scale: of the log-SNR.
    """
    return _at(schedule, mean + scale * jax.vmap(jax.random.laplace)(keys))


def lognormal(schedule: Schedule, keys: Key[Array, "batch"], mean: float = -1.2, std: float = 1.2) -> NoiseLevel:
    """log(sigma / alpha) from N(mean, std^2). The default is that of EDM (Karras et al. 2022, table 1).

    Few-step methods use it with a mean of -1.1 and a std of 2.0 (ECT, Geng et al. 2024, appendix) and with -1.0 and 1.4
    (sCM, Lu & Song 2024, section 4.2 and appendix). On the straight path it is logit(u), which JiT draws with a mean
    of 0.8 and a std of 0.8 (Li & He 2025).
    """
    return _at(schedule, -2 * (mean + std * jax.vmap(jax.random.normal)(keys)))


def logit_normal(schedule: Schedule, keys: Key[Array, "batch"]) -> NoiseLevel:
    """logit(u) from N(0, 1), u = sigma / (alpha + sigma), as in rectified flow (Esser et al. 2024, section 3.1)."""
    return _at(schedule, -2 * jax.vmap(jax.random.normal)(keys))


def _at(schedule: Schedule, logsnr: Float[Array, "batch"]) -> NoiseLevel:
    """The schedule's levels at these log-SNR, clipped to its ends."""
    return schedule(schedule.t_of_logsnr(logsnr))


def uniform_weight(level: NoiseLevel, parameterization: Parameterization) -> Float[Array, "batch"]:
    """Weight 1 on the squared error of the network's output (L_simple, Ho et al. 2020, eq. 14)."""
    return jnp.ones_like(level.sigma)


def relative_weight(level: NoiseLevel, parameterization: Parameterization) -> Float[Array, "batch"]:
    """1 / (p^2 + q^2): the squared error of the output p x0 + q eps relative to its variance, for data of variance 1.

    It is uniform, except for edm and for v on a schedule that does not preserve the variance, where v grows like sigma.
    """
    p, q = parameterization.coefficients(level)
    return jnp.broadcast_to(1 / (p**2 + q**2), jnp.shape(level.sigma))


def inverse_noise_weight(level: NoiseLevel, parameterization: Parameterization) -> Float[Array, "batch"]:
    """alpha / sigma on the squared error of x0 (the 1 / t of ECT, Geng et al. 2024, section 3.2)."""
    return _on_x0(level.alpha / level.sigma, level, parameterization)


def velocity_weight(
    level: NoiseLevel, parameterization: Parameterization, floor: float = 0.05
) -> Float[Array, "batch"]:
    """1 / max(u, floor)^2 on the squared error of x0, u = sigma / (alpha + sigma): that of the velocity (z - x0) / u on
    the straight path, bounded near clean data (Li & He 2025, JiT; JLT, arXiv 2605.27102).
    """
    u = level.sigma / (level.alpha + level.sigma)
    return _on_x0(1 / jnp.maximum(u, floor) ** 2, level, parameterization)


def min_snr_weight(level: NoiseLevel, parameterization: Parameterization, gamma: float = 5.0) -> Float[Array, "batch"]:
    """min(SNR, gamma) on the squared error of x0 (Hang et al. 2023, section 3.4)."""
    return _on_x0(jnp.minimum(snr(level), gamma), level, parameterization)


def truncated_snr_weight(level: NoiseLevel, parameterization: Parameterization) -> Float[Array, "batch"]:
    """max(SNR, 1) on the squared error of x0 (Salimans & Ho 2022, section 4)."""
    return _on_x0(jnp.maximum(snr(level), 1.0), level, parameterization)


def _on_x0(weight: Array, level: NoiseLevel, parameterization: Parameterization) -> Array:
    """Convert a weight on the squared error of x0 to one on the squared error of the network's output."""
    return weight * parameterization.magnification(level) ** 2
