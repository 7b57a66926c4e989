"""Solvers as tables: f(schedule, steps, spacing, ...) -> Plan, built on the host in float64 (see `plan`)."""

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
from diffusion_jax.core.solvers.singlestep import dpm_solver, dpmpp_2s, dpmpp_sde, heun, with_churn

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
    "heun",
    "lms",
    "plms",
    "strength_times",
    "times",
    "unipc",
    "with_churn",
    "with_resampling",
]
