"""Solvers as tables: each builds, on the host in float64, the rows that `sampling.sample` runs.

A row evaluates the denoiser at its level, giving (x0, eps), and then

    d  = memory[0] * x0 + memory[1] * eps                      what later rows may look back at
    x <- x0_coef * x0 + eps_coef * eps + sum_k past[k] * d_k + noise * z      d_1 the last row's d, d_2 the one before,
    ...

Since x = alpha x0 + sigma eps, any rule linear in the state, the predictions and fresh noise has this form.
In the formulas below a prime marks the level after the row: alpha', sigma'.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import DiscreteSchedule

HISTORY = 3  # how many past d a row may use
Spacing = str | Sequence[int | float] | np.ndarray
SPACINGS = ("leading", "linspace", "trailing", "karras", "logsnr", "quadratic")


class Plan(NamedTuple):
    """A solver, as data. R rows, numpy float64 until it is handed to the device.

    level: NoiseLevel of (R,), where row i evaluates the denoiser. next: NoiseLevel of (R,), the state's level after row
    i.
    x0, eps, noise: (R,) coefficients. memory: (R, 2) on (x0, eps). past: (R, HISTORY).
    """

    level: NoiseLevel
    next: NoiseLevel
    x0: ArrayLike
    eps: ArrayLike
    noise: ArrayLike
    memory: ArrayLike
    past: ArrayLike

    @property
    def num_rows(self) -> int:
        """R, which is also the number of times that the denoiser is evaluated."""
        return len(self.x0)

    @property
    def start(self) -> NoiseLevel:
        """The level of the state before the first row, scalars."""
        return NoiseLevel(*(v[0] for v in self.level))


def times(schedule: DiscreteSchedule, steps: int, spacing: Spacing) -> np.ndarray:
    """The times at which a solver of `steps` steps evaluates the network: (steps,) float64, falling.

    spacing: one of SPACINGS, or the times themselves, (steps,) strictly falling within [t_min, t_max].
      leading   i * (T // steps), from 0 up (Ho et al. 2020; Song et al. 2021, appendix D.3)
      linspace  evenly from t_max to t_min, rounded
      trailing  evenly from t_max, rounded, first step kept at full noise (Lin et al. 2023, table 2)
      karras    sigma / alpha on a rho = 7 ramp (Karras et al. 2022, eq. 5)
      logsnr    evenly in log-SNR (Lu et al. 2022, section 3.3)
      quadratic squares of an even ramp of sqrt(t) (Song et al. 2021, appendix D.3)
    Raises ValueError for steps outside 1..T and for an unknown spacing.
    """
    t_min, t_max = schedule.t_min, schedule.t_max
    if not isinstance(spacing, str):
        t = np.asarray(spacing, np.float64)
        if t.shape != (steps,) or np.any(np.diff(t) >= 0) or t[0] > t_max or t[-1] < t_min:
            raise ValueError(
                f"explicit times must be {steps} strictly falling values in [{t_min:g}, {t_max:g}], got {t}"
            )
        return t
    if not 1 <= steps <= schedule.num_steps:
        raise ValueError(f"steps must be in 1..{schedule.num_steps}, the schedule's number of steps, got {steps}")
    ramp = np.linspace(0, 1, steps)
    match spacing:
        case "leading":
            return np.arange(steps)[::-1] * float(schedule.num_steps // steps)
        case "linspace":
            return np.round(t_max + ramp * (t_min - t_max))
        case "trailing":
            return np.round(np.arange(steps, 0, -1) * (schedule.num_steps / steps)) - 1.0
        case "quadratic":
            return (t_max**0.5 + ramp * (t_min**0.5 - t_max**0.5)) ** 2
        case "logsnr":
            high, low = schedule(t_max).logsnr, schedule(t_min).logsnr
            return schedule.t_of_logsnr(high + ramp * (low - high))
        case "karras":
            high, low = np.exp(-schedule(t_max).logsnr / 14), np.exp(-schedule(t_min).logsnr / 14)
            return schedule.t_of_logsnr(-14 * np.log(high + ramp * (low - high)))
    raise ValueError(f"unknown spacing {spacing!r}: one of {', '.join(SPACINGS)}, or a list of times")


def _path(schedule: DiscreteSchedule, steps: int, spacing: Spacing) -> tuple[NoiseLevel, NoiseLevel]:
    """The levels of the rows and the levels after them; the last step ends on clean data, alpha = 1, sigma = 0."""
    level = schedule(times(schedule, steps, spacing))
    clean = NoiseLevel(t=schedule.t_min, alpha=1.0, sigma=0.0)
    return level, NoiseLevel(*(np.append(now[1:], end) for now, end in zip(level, clean, strict=True)))


def _plan(level: NoiseLevel, next: NoiseLevel, x0, eps, noise=0.0, memory=(1.0, 0.0), past=()) -> Plan:
    """Fill a plan from coefficients of shape () or (R,); `past` is a sequence of at most HISTORY of them."""
    rows = len(level.t)
    full = [np.broadcast_to(np.asarray(c, np.float64), rows) for c in (x0, eps, noise)]
    history = np.zeros((rows, HISTORY))
    for k, coefficient in enumerate(past):
        history[:, k] = coefficient
    return Plan(level, next, *full, np.broadcast_to(np.asarray(memory, np.float64), (rows, 2)), history)


def ddim(schedule: DiscreteSchedule, steps: int, spacing: Spacing = "trailing", eta: float = 0.0) -> Plan:
    """Denoising diffusion implicit model (Song et al. 2021, eq. 12 and 16).

    x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,   s = eta (sigma' / sigma) sqrt(sigma^2 - (alpha / alpha')^2
    sigma'^2)
    eta 0 is deterministic, eta 1 is ancestral sampling with the posterior's variance.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")
    level, next = _path(schedule, steps, spacing)
    s = eta * _posterior_std(level, next)
    if np.any(s > next.sigma):
        raise ValueError(f"eta {eta} asks for more noise than the next level holds; use at most 1")
    return _plan(level, next, x0=next.alpha, eps=np.sqrt(next.sigma**2 - s**2), noise=s)


def _posterior_std(level: NoiseLevel, next: NoiseLevel) -> np.ndarray:
    """Standard deviation of q(x' | x, x0): sigma_{t|s} sigma' / sigma (Kingma et al. 2021, eq. 25)."""
    return _transition_std(level, next) * next.sigma / level.sigma


def _transition_std(level: NoiseLevel, next: NoiseLevel) -> np.ndarray:
    """Standard deviation of q(x | x'), sigma_{t|s}^2 = sigma^2 - (alpha / alpha')^2 sigma'^2; sqrt(beta_t) for steps of
    1.
    """
    return np.sqrt(np.maximum(level.sigma**2 - (level.alpha / next.alpha * next.sigma) ** 2, 0))


def ddpm(schedule: DiscreteSchedule, steps: int, spacing: Spacing = "trailing", variance: str = "small") -> Plan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also with fewer steps than T.

    The posterior mean of q(x' | x, x0) (eq. 7) is  alpha' x0 + sqrt(sigma'^2 - s^2) eps  with s the posterior's
    standard
    deviation. variance "small" adds s z; "large" adds sqrt(beta) z (section 3.2). The last step adds no noise.
    """
    level, next = _path(schedule, steps, spacing)
    s = _posterior_std(level, next)
    match variance:
        case "small":
            noise = s
        case "large":
            noise = np.where(next.sigma > 0, _transition_std(level, next), 0.0)
        case _:
            raise ValueError(f"unknown variance {variance!r}: one of 'small', 'large'")
    return _plan(level, next, x0=next.alpha, eps=np.sqrt(next.sigma**2 - s**2), noise=noise)


def dpmpp_2m(schedule: DiscreteSchedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), second order, one evaluation a step.

    lambda = log(alpha / sigma),  h_i = lambda' - lambda,  r_i = h_{i-1} / h_i
    D  = (1 + 1 / (2 r_i)) x0_i - 1 / (2 r_i) x0_{i-1}
    x' = (sigma' / sigma) x - alpha' (exp(-h_i) - 1) D
    The first step, and the last one, which ends on sigma' = 0 (h infinite), are of first order: D = x0_i.
    """
    level, next = _path(schedule, steps, spacing)
    lam = level.logsnr / 2
    h = np.diff(lam)  # of all steps but the last
    correction = np.zeros(steps)  # 1 / (2 r_i)
    correction[1:-1] = h[1:] / (2 * h[:-1])
    ratio = next.sigma / level.sigma
    weight = next.alpha - ratio * level.alpha  # -alpha' (exp(-h) - 1), without the infinity
    return _plan(
        level,
        next,
        x0=ratio * level.alpha + weight * (1 + correction),
        eps=ratio * level.sigma,
        past=(-weight * correction,),
    )
