"""Noise schedules: time -> noise level, and back.

A schedule is a callable `schedule(t) -> NoiseLevel` with `t_of_logsnr(l)`, `t_min` and `t_max`. Given numpy it answers
in
numpy float64 (plans are built there, exactly); given jax arrays it answers in float32 and can be traced.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.core.process import NoiseLevel


def _xp(t: ArrayLike):
    """The array module that `t` lives in: jax.numpy for jax arrays and tracers, else numpy."""
    return jnp if isinstance(t, jax.Array) else np


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """A variance-preserving schedule of T steps, alpha^2 + sigma^2 = 1.

    logsnr_table: (T,) float64, log(alpha_bar / (1 - alpha_bar)) of step t = 0..T-1, falling. Between steps log-SNR is
    interpolated linearly, so t may be fractional.
    """

    logsnr_table: np.ndarray

    def __post_init__(self):
        if self.logsnr_table.ndim != 1 or len(self.logsnr_table) < 1 or not np.all(np.diff(self.logsnr_table) < 0):
            raise ValueError("a schedule needs one table of strictly falling log-SNR, one value for each step")

    @property
    def num_steps(self) -> int:
        """T, the number of steps of the forward chain."""
        return len(self.logsnr_table)

    @property
    def t_min(self) -> float:
        """The least noisy time, 0."""
        return 0.0

    @property
    def t_max(self) -> float:
        """The noisiest time, T - 1."""
        return float(self.num_steps - 1)

    @property
    def alphas_bar(self) -> np.ndarray:
        """(T,) cumulative product of 1 - beta (Ho et al. 2020, section 2), float64."""
        return 1 / (1 + np.exp(-self.logsnr_table))

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """t, any shape, in [0, T-1] -> NoiseLevel of that shape."""
        xp = _xp(t)
        t = t.astype(jnp.float32) if xp is jnp else np.asarray(t, np.float64)
        logsnr = xp.interp(t, xp.arange(self.num_steps, dtype=t.dtype), xp.asarray(self.logsnr_table, t.dtype))
        # sigmoid(l) = alpha^2; each from its own sign of l, so that neither loses digits near 0 or 1
        return NoiseLevel(t=t, alpha=(1 + xp.exp(-logsnr)) ** -0.5, sigma=(1 + xp.exp(logsnr)) ** -0.5)

    def t_of_logsnr(self, logsnr: ArrayLike) -> ArrayLike:
        """The time at which the log-SNR is `logsnr`, any shape; clipped to [0, T-1]."""
        xp = _xp(logsnr)
        table = xp.asarray(self.logsnr_table[::-1])
        return xp.interp(logsnr, table, xp.arange(self.num_steps - 1, -1, -1.0))


def from_betas(betas: Sequence | np.ndarray) -> DiscreteSchedule:
    """The schedule of a forward chain with variances `betas` (T,), each in (0, 1): alpha_bar_t = prod(1 - beta_s)."""
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas must be one row of values inside (0, 1), got shape {betas.shape}")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return DiscreteSchedule(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas linear in t (Ho et al. 2020, section 4)."""
    return from_betas(np.linspace(beta_start, beta_end, T))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """sqrt(beta) linear in t (Rombach et al. 2022; the schedule of Stable Diffusion)."""
    return from_betas(np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2)


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2), u = t / T (Nichol & Dhariwal 2021, eq. 17)."""
    return _from_alpha_bar(lambda u: np.cos((u + s) / (1 + s) * np.pi / 2) ** 2, T, max_beta)


def sigmoid(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> DiscreteSchedule:
    """alpha_bar falls along a sigmoid from `start` to `end` at temperature `tau` (Jabri et al. 2022, algorithm 2)."""

    def s(v):
        return 1 / (1 + np.exp(-v / tau))

    return _from_alpha_bar(lambda u: (s(end) - s(start + u * (end - start))) / (s(end) - s(start)), T, max_beta)


def _from_alpha_bar(alpha_bar, T: int, max_beta: float) -> DiscreteSchedule:
    """Discretise a continuous alpha_bar(u), u in [0, 1], by beta_t = 1 - alpha_bar((t+1)/T) / alpha_bar(t/T)."""
    if T < 1:
        raise ValueError(f"T, the number of steps, must be at least 1, got {T}")
    u = np.arange(T + 1) / T
    return from_betas(np.clip(1 - alpha_bar(u[1:]) / alpha_bar(u[:-1]), 1e-12, max_beta))
