"""The samplers of published flow models: the paths of their levels."""

import itertools
from collections.abc import Mapping

import numpy as np

from diffusion_jax.core import solvers
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers import Plan
from diffusion_jax.core.solvers.plan import Step


def ramp_of(config: Mapping, high: float, low: float, steps: int) -> np.ndarray | None:
    """The levels of s from high to low that the config sets; None if it uses those of the time steps."""
    high, low = config.get("sigma_max") or high, config.get("sigma_min") or low
    part = np.linspace(0, 1, steps)
    if config.get("use_karras_sigmas"):
        return (high ** (1 / 7) + part * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return np.exp(np.log(high) + part * (np.log(low) - np.log(high)))
    if config.get("use_beta_sigmas"):
        from scipy.special import betaincinv  # imported late: it takes a fifth of a second

        return low + (high - low) * betaincinv(0.6, 0.6, 1 - part)
    return None


def flow_path(config: Mapping, schedule: Schedule, steps: int) -> list[Step]:
    """The path through levels s = sigma = 1 - alpha: even ones, shifted towards noise, stretched to end on
    shift_terminal, or on a ramp between the first and the last of these.

    Without `sigmas`, the even levels go from 1 to 1 / T. Unless the shift is dynamic, that end is shifted already.
    use_dynamic_shifting None, of a class without this field, is dynamic where there is a `mu`.
    """
    T, shift = config["num_train_timesteps"], config["shift"]
    is_dynamic, mu = config["use_dynamic_shifting"], config.get("mu")
    is_dynamic = mu is not None if is_dynamic is None else is_dynamic
    if is_dynamic and mu is None:
        raise ValueError("use_dynamic_shifting: the shift depends on the size of the image, set mu")
    if is_dynamic:
        shift = np.exp(mu) if config["time_shift_type"] == "exponential" else mu
    s = config.get("sigmas")
    s = np.linspace(1, 1 / T if is_dynamic else _shifted(1 / T, shift), steps) if s is None else np.asarray(s, float)
    if len(s) != steps:
        raise ValueError(f"sigmas: expected {steps} of them, one for each step, got {len(s)}")
    s = _shifted(s, shift)
    if config["shift_terminal"]:
        if not 0 < config["shift_terminal"] < 1 or steps < 2:
            raise ValueError(
                "shift_terminal: expected a level between 0 and 1, and at least 2 steps, got "
                f"{config['shift_terminal']!r} and {steps}"
            )
        s = 1 - (1 - s) * (1 - config["shift_terminal"]) / (1 - s[-1])
    ramp = ramp_of(config, s[0], s[-1], steps)
    s = np.append(s if ramp is None else ramp, 0.0)
    return list(itertools.pairwise(map(NoiseLevel, T * s, 1 - s, s)))


def _shifted(s: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Esser et al. 2024, eq. 23."""
    return shift * s / (1 + (shift - 1) * s)


def flow_euler(config: Mapping, schedule: Schedule, grid: list[Step], steps: int) -> Plan:
    solver = solvers.consistency if config["stochastic_sampling"] else solvers.euler
    return solver(schedule, len(grid), grid)
