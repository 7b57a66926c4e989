"""Noise schedules: time -> noise level, and back.

A schedule is a callable `schedule(t) -> NoiseLevel` with `t_of_logsnr(l)`, `t_min` and `t_max`. For numpy input it
returns numpy float64, which plans are built in. For jax arrays it returns float32 and can be traced.

A schedule has its own time, from t_min to t_max. `NoiseLevel.t` is the time that the network sees and may be on another
scale. Pass a schedule only its own times; `t_of_logsnr` returns them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.core.process import NoiseLevel

RHO = 7  # of Karras et al. 2022, eq. 5: their steps are even in sigma^(1/7)
NOISE_ALONE = 200.0  # at this sigma / alpha and above, a state is pure noise in practice; linear ends at 157, edm at 80


@runtime_checkable
class Schedule(Protocol):
    """What every schedule offers.

    num_steps: T, or None in continuous time.
    t_min, t_max: the least and the most noisy time.
    resolution: a difference of times that is small on the scale of the schedule.
    """

    num_steps: int | None
    t_min: float
    t_max: float
    resolution: float

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """t, any shape, in [t_min, t_max] -> NoiseLevel of that shape."""

    def t_of_logsnr(self, logsnr: ArrayLike) -> ArrayLike:
        """The time at which the log-SNR is `logsnr`, any shape; clipped to [t_min, t_max]."""

    def at(self, fraction: ArrayLike) -> ArrayLike:
        """The time at a fraction, in (0, 1], of the way to t_max. Even steps of the fraction are good solver steps."""

    def fraction_of(self, t: ArrayLike) -> ArrayLike:
        """The fraction at which the time is t: the inverse of `at`."""

    def until(self, t: float) -> "Schedule":
        """The same schedule without the times above t, which must be one of its times."""


def _xp(t: ArrayLike):
    """The array module for `t`: jax.numpy for jax arrays and tracers, else numpy."""
    return jnp if isinstance(t, jax.Array) else np


def _time(t: ArrayLike) -> ArrayLike:
    """t as float32 for jax arrays, else as float64."""
    return t.astype(jnp.float32) if isinstance(t, jax.Array) else np.asarray(t, np.float64)[()]


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """A variance-preserving schedule of T steps, alpha^2 + sigma^2 = 1.

    logsnr_table: (T,) float64, log(alpha_bar / (1 - alpha_bar)) of step t = 0..T-1, falling. Log-SNR is interpolated
      linearly between steps, so t may be fractional. The last entry may be -inf (zero terminal SNR). On the way to it
      alpha falls linearly to 0.
    """

    logsnr_table: np.ndarray

    def __post_init__(self):
        if self.logsnr_table.ndim != 1 or len(self.logsnr_table) < 1 or not np.all(np.diff(self.logsnr_table) < 0):
            raise ValueError("a schedule needs a table of strictly falling log-SNR, one value for each step")

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
    def resolution(self) -> float:
        """One step."""
        return 1.0

    @property
    def alphas_bar(self) -> np.ndarray:
        """(T,) cumulative product of 1 - beta (Ho et al. 2020, section 2), float64."""
        return 1 / (1 + np.exp(-self.logsnr_table))

    @property
    def _finite_table(self) -> np.ndarray:
        """The table with an infinite last entry replaced by the entry before it."""
        return np.maximum(self.logsnr_table, self.logsnr_table[np.isfinite(self.logsnr_table)][-1])

    @property
    def _ends_in_noise(self) -> bool:
        return bool(np.isneginf(self.logsnr_table[-1]))

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """t, any shape, in [0, T-1] -> NoiseLevel of that shape."""
        xp, t = _xp(t), _time(t)
        logsnr = xp.interp(t, xp.arange(self.num_steps, dtype=t.dtype), xp.asarray(self._finite_table, t.dtype))
        # sigmoid(l) = alpha^2 and sigmoid(-l) = sigma^2; computed separately, so neither loses digits near 0 or 1
        alpha, sigma = (1 + xp.exp(-logsnr)) ** -0.5, (1 + xp.exp(logsnr)) ** -0.5
        if self._ends_in_noise:
            remaining = xp.clip(self.t_max - t, 0, 1)
            alpha = alpha * remaining
            sigma = xp.where(remaining < 1, xp.sqrt(1 - alpha**2), sigma)[()]
        return NoiseLevel(t, alpha, sigma)

    def t_of_logsnr(self, logsnr: ArrayLike) -> ArrayLike:
        """The time at which the log-SNR is `logsnr`, any shape; clipped to [0, T-1]."""
        xp = _xp(logsnr)
        table = self._finite_table
        steps = np.arange(self.num_steps, dtype=np.float64)
        if not self._ends_in_noise:
            return xp.interp(logsnr, table[::-1], steps[::-1])
        t = xp.interp(logsnr, table[-2::-1], steps[-2::-1])
        remaining = (1 + xp.exp(-table[-2])) ** 0.5 * (1 + xp.exp(-logsnr)) ** -0.5
        return xp.where(logsnr < table[-2], self.t_max - remaining, t)[()]

    def at(self, fraction: ArrayLike) -> ArrayLike:
        """fraction (T - 1)."""
        return fraction * self.t_max

    def fraction_of(self, t: ArrayLike) -> ArrayLike:
        """t / (T - 1)."""
        return t / max(self.t_max, 1.0)

    def until(self, t: float) -> "DiscreteSchedule":
        """The same schedule without the steps above t, in [0, T-1]."""
        return replace(self, logsnr_table=self.logsnr_table[: int(t) + 1])


@dataclass(frozen=True)
class EDMSchedule:
    """Variance exploding: alpha = 1, sigma = t (Karras et al. 2022, table 1), t in [sigma_min, sigma_max]."""

    t_min: float
    t_max: float
    num_steps = None

    @property
    def resolution(self) -> float:
        """A thousandth of the noisiest time."""
        return self.t_max / 1000

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """t, any shape -> NoiseLevel of that shape."""
        t = _time(t)
        return NoiseLevel(t, _xp(t).ones_like(t)[()], t)

    def t_of_logsnr(self, logsnr: ArrayLike) -> ArrayLike:
        """sigma = exp(-logsnr / 2), clipped to [sigma_min, sigma_max]."""
        xp = _xp(logsnr)
        return xp.clip(xp.exp(-0.5 * logsnr), self.t_min, self.t_max)

    def at(self, fraction: ArrayLike) -> ArrayLike:
        """Even in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
        low, high = self._ramp
        return _xp(fraction).clip((low + fraction * (high - low)) ** RHO, self.t_min, self.t_max)

    def fraction_of(self, t: ArrayLike) -> ArrayLike:
        """The fraction of the way from sigma_min^(1/7) to sigma_max^(1/7)."""
        low, high = self._ramp
        return (t ** (1 / RHO) - low) / (high - low)

    @property
    def _ramp(self) -> tuple[float, float]:
        return self.t_min ** (1 / RHO), self.t_max ** (1 / RHO)

    def until(self, t: float) -> "EDMSchedule":
        """The same schedule with sigma_max = t."""
        return replace(self, t_max=float(t))


@dataclass(frozen=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - u, sigma = u with u = shift t / (1 + (shift - 1) t), t in [1/1000, t_max].

    The network sees `unit` t, by default 1000 t as in published flow models, because sinusoidal time embeddings are
    scaled for 0 to 1000.
    """

    shift: float
    t_max: float = 1.0
    unit: float = 1000.0
    t_min = 1e-3
    resolution = 1e-3
    num_steps = None

    def __call__(self, t: ArrayLike) -> NoiseLevel:
        """t, any shape -> NoiseLevel of that shape."""
        t = _time(t)
        clean, noisy = 1 - t, self.shift * t  # a form that is exact at t = 1
        return NoiseLevel(self.unit * t, clean / (clean + noisy), noisy / (clean + noisy))

    def t_of_logsnr(self, logsnr: ArrayLike) -> ArrayLike:
        """t = 1 / (1 + shift exp(logsnr / 2)), clipped to [t_min, t_max]."""
        xp = _xp(logsnr)
        return xp.clip(1 / (1 + self.shift * xp.exp(0.5 * logsnr)), self.t_min, self.t_max)

    def at(self, fraction: ArrayLike) -> ArrayLike:
        """fraction t_max, and not below t_min."""
        return _xp(fraction).maximum(fraction * self.t_max, self.t_min)

    def fraction_of(self, t: ArrayLike) -> ArrayLike:
        """t / t_max."""
        return t / self.t_max

    def until(self, t: float) -> "FlowSchedule":
        """The same schedule with t_max = t."""
        return replace(self, t_max=float(t))


def from_betas(betas: Sequence | np.ndarray) -> DiscreteSchedule:
    """The schedule of a forward chain: alpha_bar_t = prod(1 - beta_s), s = 0..t.

    betas: (T,), each in (0, 1). The variance of each step.
    Raises ValueError for betas of another shape or range.
    """
    return _from_log_alpha_bar(_log_alpha_bar(betas))


def _log_alpha_bar(betas: Sequence | np.ndarray) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not np.all((betas > 0) & (betas < 1)):
        raise ValueError(f"betas must be one row of values inside (0, 1), got shape {betas.shape}")
    return np.cumsum(np.log1p(-betas))


def _from_log_alpha_bar(log_alpha_bar: np.ndarray) -> DiscreteSchedule:
    return DiscreteSchedule(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Betas linear in t (Ho et al. 2020, section 4).

    T: number of steps. Any T ends equally noisy: alpha_bar is that of the 1000-step chain at every 1000/T-th step. For
      T betas of your own, use `from_betas`.
    beta_start, beta_end: first and last beta of the 1000-step chain.
    """
    return _in_steps(T, np.linspace(beta_start, beta_end, 1000))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """sqrt(beta) linear in t (Rombach et al. 2022): the schedule of Stable Diffusion.

    T, beta_start, beta_end: as in `linear`.
    """
    return _in_steps(T, np.linspace(beta_start**0.5, beta_end**0.5, 1000) ** 2)


def _in_steps(T: int, betas: np.ndarray) -> DiscreteSchedule:
    """The chain with variances `betas` in T equal steps; log alpha_bar is interpolated linearly."""
    _check_steps(T)
    positions = np.arange(1, T + 1) * len(betas) / T
    return _from_log_alpha_bar(np.interp(positions, np.arange(len(betas) + 1), np.append(0.0, _log_alpha_bar(betas))))


def _check_steps(T: int) -> None:
    if T < 1:
        raise ValueError(f"T, the number of steps, must be at least 1, got {T}")


def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> DiscreteSchedule:
    """The cosine schedule (Nichol & Dhariwal 2021, eq. 17), with u = t / T:

        alpha_bar(u) = cos^2((u + s) / (1 + s) * pi / 2)

    T: number of steps.
    s: offset that keeps the first betas from being too small.
    max_beta: upper limit of a beta.
    """
    return _from_alpha_bar(lambda u: np.cos((u + s) / (1 + s) * np.pi / 2) ** 2, T, max_beta)


def sigmoid(
    T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0, max_beta: float = 0.999
) -> DiscreteSchedule:
    """alpha_bar falls along a sigmoid (Jabri et al. 2022, algorithm 2).

    T: number of steps.
    start, end: the part of the sigmoid that is used.
    tau: its temperature.
    max_beta: upper limit of a beta.
    """

    def s(v):
        return 1 / (1 + np.exp(-v / tau))

    return _from_alpha_bar(lambda u: (s(end) - s(start + u * (end - start))) / (s(end) - s(start)), T, max_beta)


def _from_alpha_bar(alpha_bar, T: int, max_beta: float) -> DiscreteSchedule:
    """Discretise a continuous alpha_bar(u), u in [0, 1], by beta_t = 1 - alpha_bar((t+1)/T) / alpha_bar(t/T)."""
    _check_steps(T)
    u = np.arange(T + 1) / T
    return from_betas(np.clip(1 - alpha_bar(u[1:]) / alpha_bar(u[:-1]), 1e-12, max_beta))


def zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """The schedule rescaled so that its last step is pure noise (Lin et al. 2023, algorithm 1).

    sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value. The network must predict v or x0.

    schedule: of at least 2 steps, such as `linear()`.
    Raises ValueError for any other.
    """
    if not isinstance(schedule, DiscreteSchedule) or schedule.num_steps < 2:
        raise ValueError("zero_terminal_snr needs a schedule of at least 2 steps, such as linear or scaled_linear")
    root = np.sqrt(schedule.alphas_bar)
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    with np.errstate(divide="ignore"):
        return DiscreteSchedule(np.log(alpha_bar) - np.log1p(-alpha_bar))


def below(schedule: Schedule, ratio: float = NOISE_ALONE) -> Schedule:
    """Restrict the schedule to times with sigma / alpha at most `ratio`. Returns it unchanged if all times qualify.

    Use it to sample with a network that predicts eps: x0 = (x_t - sigma eps) / alpha magnifies the network's error by
    sigma / alpha, which is 20,000 at the last step of cosine and infinite at zero terminal SNR. At a ratio of 200 the
    state is pure noise in practice, so sampling may start there.
    schedule: any. A schedule of T steps keeps its first steps; their number is the new T.
    ratio: largest sigma / alpha.
    Raises ValueError if every time of the schedule is noisier.
    """
    limit = -2 * np.log(ratio)
    if schedule(schedule.t_max).logsnr >= limit:
        return schedule
    least_noisy = schedule(schedule.t_min)
    if not least_noisy.logsnr >= limit:
        least_ratio = least_noisy.sigma / least_noisy.alpha
        raise ValueError(
            f"the ratio must be at least {least_ratio:g}, that of the schedule's least noisy time, got {ratio}"
        )
    return schedule.until(schedule.t_of_logsnr(limit))


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDMSchedule:
    """Variance exploding, alpha = 1, with sigma as its time (Karras et al. 2022, table 1).

    sigma_min, sigma_max: the least and the largest sigma, 0 < sigma_min < sigma_max.
    """
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"edm needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return EDMSchedule(float(sigma_min), float(sigma_max))


def flow(shift: float = 1.0, unit: float = 1000.0) -> FlowSchedule:
    """Rectified flow, x_t = (1 - u) x0 + u eps (Liu et al. 2022), with u = shift t / (1 + (shift - 1) t).

    shift: above 0. More than 1 spends more of the time on high noise, as for large images (Esser et al. 2024, eq. 23).
    unit: the time of pure noise as the network sees it.
    """
    if not shift > 0:
        raise ValueError(f"the shift of a flow schedule must be above 0, got {shift}")
    return FlowSchedule(float(shift), unit=float(unit))
