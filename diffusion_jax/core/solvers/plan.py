"""Plans: solvers as data, built on the host in float64 and run by `sampling.sample`.

A row evaluates the denoiser at its level, which gives (x0, eps), and then computes

    d  = memory[0] x0 + memory[1] eps                                what later rows may use
    x <- x0_coef x0 + eps_coef eps + noise z + sum_k past[k] d_k     d_1 the last row's d, d_2 the one before, ...

Since x = alpha x0 + sigma eps, any rule linear in the state, the predictions and fresh noise has this form. Solvers
write such rules as formulas in the unit vectors X0, EPS, Z and PAST = [d_1, d_2, ...].
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import RHO, Schedule

HISTORY = 4  # how many past d a row may use
X0, EPS, Z, *PAST = np.eye(3 + HISTORY)
SPACINGS = ("leading", "linspace", "trailing", "karras", "logsnr", "quadratic")

Step = tuple[NoiseLevel, NoiseLevel]
Spacing = str | Sequence[int | float] | Sequence[Step] | np.ndarray


class Plan(NamedTuple):
    """A solver, as data. R rows, numpy float64 until they are copied to the device.

    level: NoiseLevel of (R,), where row i evaluates the denoiser.
    next: NoiseLevel of (R,), the state's level after row i.
    x0, eps, noise: (R,) coefficients.
    memory: (R, 2) coefficients of (x0, eps).
    past: (R, HISTORY) coefficients.
    initial: (), standard deviation of the initial noise. By default that of x_t for data of unit variance.
    to: NoiseLevel of (R,), the target level that the denoiser gets in row i: `next`, but for steps through clean data.
    """

    level: NoiseLevel
    next: NoiseLevel
    x0: ArrayLike
    eps: ArrayLike
    noise: ArrayLike
    memory: ArrayLike
    past: ArrayLike
    initial: ArrayLike
    to: NoiseLevel

    @property
    def num_rows(self) -> int:
        """R, also the number of evaluations of the denoiser."""
        return len(self.x0)

    @property
    def start(self) -> NoiseLevel:
        """The level of the state before the first row, as scalars."""
        return NoiseLevel(*(v[0] for v in self.level))


class Row(NamedTuple):
    """One row of a plan under construction.

    level, next: NoiseLevel of scalars.
    update: the new x, in unit vectors.
    memory: d, in X0 and EPS.
    to: NoiseLevel of scalars, None for next.
    """

    level: NoiseLevel
    next: NoiseLevel
    update: np.ndarray
    memory: np.ndarray = X0
    to: NoiseLevel | None = None


def stack(rows: Iterable[Row]) -> Plan:
    """Stack the rows into a plan. No rows give a plan that changes nothing."""
    rows = list(rows)
    level, next, update, memory, _ = zip(*rows, strict=True) if rows else [()] * 5
    x0, eps, noise, *past = np.reshape(update, (-1, len(X0))).T
    to = [row.to or row.next for row in rows]
    initial = np.hypot(rows[0].level.alpha, rows[0].level.sigma) if rows else 1.0
    memory = np.reshape(memory, (-1, len(X0)))[:, :2]
    return Plan(_levels(level), _levels(next), x0, eps, noise, memory, np.stack(past, axis=1), initial, _levels(to))


def joined(plans: Sequence[Plan]) -> Plan:
    """One plan after another, each starting where the one before it ends."""
    bare = [plan._replace(initial=None) for plan in plans]
    rows = jax.tree.map(lambda *columns: np.concatenate(columns), *bare)
    return rows._replace(initial=plans[0].initial)


def _levels(levels: Sequence[NoiseLevel]) -> NoiseLevel:
    return NoiseLevel(*np.reshape(np.array(levels, np.float64), (-1, 3)).T)


def state(level: NoiseLevel) -> np.ndarray:
    """alpha x0 + sigma eps, in unit vectors: x itself at a row's own level, a first-order step at another level."""
    return level.alpha * X0 + level.sigma * EPS


def times(schedule: Schedule, steps: int, spacing: Spacing) -> np.ndarray:
    """The times at which a solver of `steps` steps evaluates the network: (steps,) float64, falling.

    spacing: one of SPACINGS, or the times themselves, (steps,) strictly falling within [t_min, t_max].
    Raises ValueError for steps outside 1..T and for an unknown spacing.

        leading    i * (T // steps), from 0 up (Ho et al. 2020; Song et al. 2021, appendix D.3)
        linspace   evenly from t_max to t_min
        trailing   evenly from t_max, first step kept at full noise (Lin et al. 2023, table 2)
        karras     sigma / alpha on a rho = 7 ramp (Karras et al. 2022, eq. 5)
        logsnr     evenly in log-SNR (Lu et al. 2022, section 3.3)
        quadratic  squares of an even ramp of sqrt(t) (Song et al. 2021, appendix D.3)

    The first three are whole numbers on a schedule of T steps. In continuous time, leading goes evenly up from t_min
    and ends one step short of t_max; trailing goes down to `schedule.at(1 / steps)`.
    """
    t_min, t_max, T = schedule.t_min, schedule.t_max, schedule.num_steps
    if not isinstance(spacing, str):
        t = np.asarray(spacing, np.float64)
        if t.shape != (steps,) or np.any(np.diff(t) >= 0) or np.any((t > t_max) | (t < t_min)):
            raise ValueError(
                f"explicit times must be {steps} strictly falling values in [{t_min:g}, {t_max:g}], got "
                f"{np.array2string(t, max_line_width=np.inf, threshold=8)}"
            )
        return t
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: one of {', '.join(SPACINGS)}, or a list of times")
    if steps < 1 or (T and steps > T):
        allowed = f"in 1..{T}, the schedule's number of steps" if T else "at least 1"
        raise ValueError(f"steps must be {allowed}, got {steps}")
    ramp = np.linspace(0, 1, steps)
    match spacing:
        case "leading":
            up = np.arange(steps)[::-1]
            return up * float(T // steps) if T else t_min + up / steps * (t_max - t_min)
        case "linspace":
            # upwards from t_min, so that ties round as in diffusers; a single step starts from t_max
            even = np.linspace(t_min, t_max, steps)[::-1] if steps > 1 else np.array([t_max])
            return np.round(even) if T else even
        case "trailing":
            if T:
                return np.round(np.arange(steps, 0, -1) / steps * T) - 1.0
            return schedule.at(np.arange(steps, 0, -1) / steps)
        case "quadratic":
            t = (t_max**0.5 + ramp * (t_min**0.5 - t_max**0.5)) ** 2
        case _:
            # log-SNR may be infinite at t_max; the ramp then starts a little below it
            noisiest = t_max if schedule(t_max).alpha > 0 else t_max - schedule.resolution
            high, low = schedule(noisiest).logsnr, schedule(t_min).logsnr
            if spacing == "karras":
                high, low = np.exp(-high / (2 * RHO)), np.exp(-low / (2 * RHO))
                t = schedule.t_of_logsnr(-2 * RHO * np.log(high + ramp * (low - high)))
            else:
                t = schedule.t_of_logsnr(high + ramp * (low - high))
    t[0] = t_max  # exactly, despite rounding
    return np.clip(t, t_min, t_max)


def path(schedule: Schedule, steps: int, spacing: Spacing) -> list[Step]:
    """The (level, next level) of each step; the last one ends on clean data, alpha = 1, sigma = 0.

    spacing: as in `times`, or the list of steps itself. In a list, a step may start noisier than the step before ended;
      `renoised` then fills the gap.
    """
    if not isinstance(spacing, str) and len(spacing) and isinstance(spacing[0], tuple):
        return list(spacing)
    levels = [NoiseLevel(*row) for row in zip(*schedule(times(schedule, steps, spacing)), strict=True)]
    levels.append(schedule(schedule.t_min)._replace(alpha=1.0, sigma=0.0))
    return list(itertools.pairwise(levels))


def renoised(plan: Plan, scale: float = 1.0) -> Plan:
    """Add noise between rows. Where a row starts noisier than the row before it ended, that earlier row adds the noise.

    From s to a noisier t (Kingma et al. 2021, eq. 20):

        q(x_t | x_s) = N(alpha_t / alpha_s x_s, sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)

    plan: any.
    scale: factor on that noise, S_noise of Karras et al. 2022, algorithm 2.
    Raises ValueError if a row looks back across such a gap: predictions before it belong to another trajectory.
    """
    target = NoiseLevel(*(np.append(v[1:], end[-1:]) for v, end in zip(plan.level, plan.next, strict=True)))
    ratio = target.alpha / plan.next.alpha
    extra = scale * np.sqrt(np.maximum(target.sigma**2 - (ratio * plan.next.sigma) ** 2, 0))
    extra = np.where(extra > 1e-6 * target.sigma, extra, 0.0)  # levels found again from log-SNR differ by rounding
    steps_begin = np.append(True, extra > 0)[: plan.num_rows]
    rows_in_step = np.arange(plan.num_rows) - np.maximum.accumulate(np.where(steps_begin, np.arange(plan.num_rows), 0))
    if np.any(plan.past[rows_in_step[:, None] <= np.arange(HISTORY)]):
        raise ValueError("adding noise between steps needs a one-step solver (heun, euler, ...), not a multistep one")
    return plan._replace(
        next=target,
        x0=ratio * plan.x0,
        eps=ratio * plan.eps,
        noise=np.hypot(ratio * plan.noise, extra),
        past=ratio[:, None] * plan.past,
    )


def with_resampling(plan: Plan, repeats: int) -> Plan:
    """Take each step several times (RePaint, Lugmayr et al. 2022, algorithm 1, with jumps of one step).

    In between, noise takes the state back to the start of the step. An inpainted region then fits the known one better.

    plan: from a solver of one row a step (ddpm, ddim, euler, euler_ancestral, consistency).
    repeats: how often each step is taken, at least 1.
    Raises ValueError for other plans and for repeats below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if np.any(plan.past):
        raise ValueError("resampling needs a solver of one row a step: ddpm, ddim, euler or consistency")
    rows = jax.tree.map(lambda c: np.repeat(c, repeats, axis=0), plan._replace(initial=None))
    return renoised(rows._replace(initial=plan.initial))


def strength_times(schedule: Schedule, steps: int, strength: float, spacing: Spacing = "trailing") -> np.ndarray:
    """The times at which to sample when an image is to change with a given strength, for image-to-image.

    Pass the times to a solver as its spacing, and their number as its steps. There are about steps * strength of them,
    at least one. The first is at the fraction `strength` of the way to noise. Of explicit times they are the last
    round(steps * strength). A multistep solver starts its history where the image starts.

    schedule, steps, spacing: as in `times`.
    strength: in [0, 1]. 0 leaves the image as it is (no times), 1 starts from pure noise.
    Raises ValueError for another strength, and what `times` raises.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    all_times, count = times(schedule, steps, spacing), round(steps * strength)
    if strength in (0, 1) or not isinstance(spacing, str):
        return all_times[steps - count :]
    shortened = schedule.until(schedule.at(strength))
    return times(shortened, min(max(count, 1), shortened.num_steps or steps), spacing)
