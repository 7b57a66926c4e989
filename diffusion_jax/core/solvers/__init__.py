"""Solvers: functions (schedule, steps, spacing, ...) -> `Plan`. `sampling.sample` runs the plan.

Every solver takes these arguments:

schedule: from `core.schedules`. For a network that predicts eps use `schedules.below(schedule)`.
steps: number of steps, at least 1, at most T on a schedule of T steps. Each solver says how often it calls the network.
spacing: where the steps are: one of `SPACINGS`, or the times themselves, see `times`.
Raises ValueError for steps, spacings and options out of range.

A plan is a table in float64, made on the host. Running another solver does not recompile (see `plan`).
"""

from diffusion_jax.core.solvers.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m, lms, plms, unipc
from diffusion_jax.core.solvers.onestep import consistency, ddim, ddim_inversion, ddpm, dpmpp_1, euler, euler_ancestral
from diffusion_jax.core.solvers.plan import (
    HISTORY,
    SPACINGS,
    Plan,
    Spacing,
    strength_times,
    times,
    with_resampling,
)
from diffusion_jax.core.solvers.singlestep import dpm_solver, dpmpp_2s, dpmpp_sde, flow_heun, heun, with_churn

__all__ = [
    "HISTORY",
    "SPACINGS",
    "Plan",
    "Spacing",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm_solver",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "flow_heun",
    "heun",
    "lms",
    "plms",
    "strength_times",
    "times",
    "unipc",
    "with_churn",
    "with_resampling",
]
