"""Solvers that use only the current prediction.

A prime marks the level after a step: alpha', sigma'.
"""

import itertools

import numpy as np

from diffusion_jax.core.process import CLEAN, NoiseLevel
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers.plan import EPS, X0, Plan, Row, Spacing, Z, path, stack, state


def ddim(schedule: Schedule, steps: int, spacing: Spacing = "trailing", eta: float = 0.0) -> Plan:
    """Denoising diffusion implicit model (Song et al. 2021, eq. 12 and 16). `steps` network calls.

        x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z,   s = eta times the posterior's standard deviation

    eta: at least 0. 0 is deterministic, 1 is ancestral sampling.
    Raises ValueError for an eta that adds more noise than the next level has.
    """
    if not eta >= 0:
        raise ValueError(f"eta must be at least 0, got {eta}")

    def row(level: NoiseLevel, next: NoiseLevel) -> Row:
        s = eta * _posterior_std(level, next)
        if s > next.sigma:
            raise ValueError(f"eta {eta} adds more noise than the next level has; use at most 1")
        return Row(level, next, next.alpha * X0 + np.sqrt(next.sigma**2 - s**2) * EPS + s * Z)

    return stack(row(level, next) for level, next in path(schedule, steps, spacing))


def _posterior_std(level: NoiseLevel, next: NoiseLevel) -> float:
    """Standard deviation of q(x' | x, x0): sigma_{t|s} sigma' / sigma (Kingma et al. 2021, eq. 25)."""
    return _transition_std(level, next) * next.sigma / level.sigma


def _transition_std(level: NoiseLevel, next: NoiseLevel) -> float:
    """Standard deviation of q(x | x'), sigma_{t|s}^2 = sigma^2 - (alpha / alpha')^2 sigma'^2, beta for one step."""
    return np.sqrt(np.maximum(level.sigma**2 - (level.alpha / next.alpha * next.sigma) ** 2, 0))


def ddpm(schedule: Schedule, steps: int, spacing: Spacing = "trailing", variance: str = "small") -> Plan:
    """Ancestral sampling (Ho et al. 2020, algorithm 2), also with fewer steps than T. `steps` network calls.

    The mean of the posterior q(x' | x, x0) (eq. 7), whose standard deviation is s, is

        alpha' x0 + sqrt(sigma'^2 - s^2) eps

    variance: "small" adds s z, "large" adds sqrt(beta) z (section 3.2). The last step adds no noise.
    """
    stds = {"small": _posterior_std, "large": _transition_std}
    if variance not in stds:
        raise ValueError(f"unknown variance {variance!r}: one of 'small', 'large'")

    def row(level: NoiseLevel, next: NoiseLevel) -> Row:
        s = _posterior_std(level, next)
        noise = stds[variance](level, next) if next.sigma > 0 else 0.0
        return Row(level, next, next.alpha * X0 + np.sqrt(next.sigma**2 - s**2) * EPS + noise * Z)

    return stack(row(level, next) for level, next in path(schedule, steps, spacing))


def euler(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """Euler's method on d(x / alpha) / d(sigma / alpha) = eps (Karras et al. 2022, algorithm 1 without correction).

        x' / alpha' = x / alpha + (sigma' / alpha' - sigma / alpha) eps

    This is x' = alpha' x0 + sigma' eps, so it is DDIM itself (Song et al. 2021, eq. 14). `steps` network calls.
    """
    return ddim(schedule, steps, spacing)


def dpmpp_1(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """DPM-Solver++ of first order (Lu et al. 2022b, eq. 21): DDIM itself. `steps` network calls."""
    return ddim(schedule, steps, spacing)


def euler_ancestral(schedule: Schedule, steps: int, spacing: Spacing = "trailing", eta: float = 1.0) -> Plan:
    """Take an Euler step to below the next level, then add noise up to it: DDIM with `eta`. `steps` network calls.

    With s = sigma / alpha:

        s_up = eta s' sqrt(1 - s'^2 / s^2),   s_down^2 = s'^2 - s_up^2

    eta: as in `ddim`. 1 adds all of the posterior's noise.
    """
    return ddim(schedule, steps, spacing, eta)


def consistency(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023): x' = alpha' x0 + sigma' z.

    `steps` network calls.
    """
    return stack(
        Row(level, next, next.alpha * X0 + next.sigma * Z, to=CLEAN) for level, next in path(schedule, steps, spacing)
    )


def ddim_inversion(schedule: Schedule, steps: int, spacing: Spacing = "trailing") -> Plan:
    """DDIM backwards (Song et al. 2021, section 4.3): from a clean image to the noise that `ddim` turns into it.

        x' = alpha' x0 + sigma' eps,   with rising levels

    The network gets the clean image at the least noisy level. `steps` network calls.
    """
    level = [level for level, _ in reversed(path(schedule, steps, spacing))]
    first = level[0]
    clean = state(first)  # the image itself, split by the denoiser into x0 and eps
    rows = [Row(first, first, first.alpha * clean + first.sigma * EPS)]
    rows += [Row(now, next, state(next)) for now, next in itertools.pairwise(level)]
    return stack(rows)
