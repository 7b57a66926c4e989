"""The sampler of a published model: convert its scheduler_config.json of diffusers to a plan.

The plan does what diffusers 0.42 does, even where that differs from the paper; docs/samplers_peer.md lists the places.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.core import solvers
from diffusion_jax.core.process import CLEAN, NoiseLevel
from diffusion_jax.core.schedules import DiscreteSchedule, Schedule
from diffusion_jax.core.solvers import Plan
from diffusion_jax.core.solvers.plan import X0, Row, Step, Z, joined, stack, state
from diffusion_jax.interop.flow_schedulers import flow_euler, flow_path, ramp_of

# diffusers does not limit steps from pure noise
heun, dpm_solver, plms = (
    functools.partial(solver, noise_alone=np.inf) for solver in (solvers.heun, solvers.dpm_solver, solvers.plms)
)
FEW_STEPS = 15  # with fewer steps, multistep solvers lower their order at the end
ALMOST_NOISE = (2.0**24 - 1) ** 0.5  # sigma / alpha that solvers in sigma use instead of infinity


def published_plan(config: Mapping, schedule: Schedule, steps: int, strength: float = 1.0) -> Plan:
    """The plan of a scheduler_config.json.

    config: the content of the file, of one of the classes of SCHEDULERS or FLOWS. For those of FLOWS also what a
      pipeline of diffusers gives to `set_timesteps`: `mu`, the shift of an image's size, and `sigmas`, the levels that
      are shifted.
    schedule: the noise schedule of the file.
    steps: number of steps, counted as in diffusers.
    strength: in [0, 1]. To change an image: the plan has only the last int(steps * strength) of the steps.
    Raises ValueError for steps outside 1..T, for another class and for a setting that is not supported.
    """
    name = config.get("_class_name", "DDIMScheduler")
    if name not in SCHEDULERS | FLOWS:
        raise ValueError(
            f"the model's own scheduler is a {name}, which is not supported: choose a solver by its name; known "
            f"schedulers: {', '.join([*SCHEDULERS, *FLOWS])}"
        )
    most = schedule.num_steps or max(config.get("num_train_timesteps", 1000), 1000)  # of a flow, only a unit of time
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be in 1..{most}, the schedule's number of steps, got {steps}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must be in [0, 1], got {strength}")
    scheduler = (SCHEDULERS | FLOWS)[name]
    config = DEFAULTS | scheduler.defaults | {field: config[field] for field in config.keys() & scheduler.reads}
    for field, values in (SUPPORTED | scheduler.supported).items():
        _check(config, field, values)
    grid = scheduler.path(config, schedule, steps)
    skipped = len(grid) - min(int(steps * strength), len(grid))
    plan = scheduler.solver(config, schedule, grid[skipped:], steps)
    if not all(np.isfinite(part).all() for part in (plan.x0, plan.eps, plan.past, plan.noise)):
        raise ValueError(f"the numbers of the model's own {name} make no finite plan: choose a solver by its name")
    if scheduler.path is _euler_path and not skipped and config["timestep_spacing"] != "leading":
        return plan._replace(initial=plan.start.sigma)
    return plan


def with_defaults(config: Mapping) -> dict:
    """The content of a scheduler_config.json, with what its class uses for noise levels that the file leaves out.

    Another class must name its beta_schedule: it may have no betas.
    Raises ValueError for a field of another type than its default value, and for another class without one.
    """
    name = config.get("_class_name")
    _check_type("_class_name", config.get("_class_name", ""), "")
    if is_flow(config):
        config = {**FLOW_FIELDS, **config}
    for field, default in (DEFAULTS | BETAS | FLOW_FIELDS).items():
        _check_type(field, config.get(field, default), default)
    for field, default in OPTIONAL.items():
        if config.get(field) is not None:
            _check_type(field, config[field], default)
    if name in SCHEDULERS:
        return {"beta_schedule": "linear", **BETAS, **SCHEDULERS[name].defaults, **config}
    if name not in FLOWS and config.get("beta_schedule") is None and config.get("trained_betas") is None:
        raise ValueError(f"expected a beta_schedule, or a known _class_name; {name} is unknown")
    return {**BETAS, **config}


def is_flow(config: Mapping) -> bool:
    """Whether a scheduler_config.json is that of a rectified flow."""
    return config.get("_class_name") in FLOWS


def _check_type(field: str, value: Any, default: bool | float | str) -> None:
    """Raise ValueError unless the value is a flag, a name or a number, as the default one is."""
    kind, expected = {bool: (bool, "true or false"), str: (str, "a name")}.get(type(default), (int | float, "a number"))
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or value != value:
        raise ValueError(f"{field}: expected {expected}, got {value!r}")


def _check(config: Mapping, field: str, values: tuple) -> None:
    """Raise ValueError unless the field is missing or has one of the values."""
    if config.get(field, values[0]) not in values:
        raise ValueError(
            f"the model's own {config.get('_class_name', 'scheduler')} has {field}={config[field]!r}, and only "
            f"{' or '.join(map(repr, values))} is supported: choose a solver by its name"
        )


def _times(config: Mapping, T: int, steps: int, extra: int = 0, skipped: int = 0) -> np.ndarray:
    """The time steps, falling, of a schedule of T.

    extra: further steps in the grid; the cleanest ones are left out.
    skipped: noisiest time steps that are not used. Those of the spacing "trailing" stay as far apart as without it.
    """
    spacing, count, stride = config["timestep_spacing"], steps + extra, T / steps
    T = T - skipped
    if spacing == "linspace":
        return np.linspace(0, T - 1, count)[::-1][:steps]
    if spacing == "leading":
        up = np.arange(count)[::-1][:steps] * float(T // count)
        return np.minimum(up + config["steps_offset"], T - 1)
    if spacing == "trailing":
        t = np.round(np.arange(T, 0, -stride)) - 1
        return t[t >= 0]
    raise ValueError(f"timestep_spacing must be linspace, leading or trailing, got {spacing!r}")


def _table_path(config: Mapping, schedule: DiscreteSchedule, steps: int) -> list[Step]:
    """Steps of T // steps, even if the next time step differs. The last one ends on the least noise or on none."""
    t, stride = np.round(_times(config, schedule.num_steps, steps)), schedule.num_steps // steps
    end = CLEAN if config["set_alpha_to_one"] else schedule(0.0)
    return [(schedule(now), schedule(now - stride) if now >= stride else end) for now in t]


def _ddpm_path(config: Mapping, schedule: DiscreteSchedule, steps: int) -> list[Step]:
    t = np.round(_times(config, schedule.num_steps, steps))
    return list(itertools.pairwise([*map(schedule, t), CLEAN]))


def _lcm_path(config: Mapping, schedule: DiscreteSchedule, steps: int) -> list[Step]:
    """Some of the times that the student was trained on (Luo et al. 2023)."""
    original = config["original_inference_steps"]
    if steps > original:
        raise ValueError(f"steps must be at most {original}, those that the model was trained on, got {steps}")
    trained = np.arange(original, 0, -1) * (schedule.num_steps // original) - 1.0
    t = trained[np.floor(np.arange(steps) * (original / steps)).astype(int)]
    return list(itertools.pairwise([*map(schedule, t), CLEAN]))


def _in_sigma(s: np.ndarray, t: np.ndarray, last: float) -> list[Step]:
    """The path through levels of s = sigma / alpha that the network sees as t, to `last`."""
    s, t = np.append(s, last), np.append(t, 0.0)
    return list(itertools.pairwise(map(NoiseLevel, t, (1 + s**2) ** -0.5, s * (1 + s**2) ** -0.5)))


def _table(schedule: DiscreteSchedule) -> np.ndarray:
    """sigma / alpha of all time steps, rising."""
    level = schedule(np.arange(schedule.num_steps))
    return level.sigma / np.where(level.alpha > 0, level.alpha, level.sigma / ALMOST_NOISE)


def _euler_path(config: Mapping, schedule: DiscreteSchedule, steps: int) -> list[Step]:
    """The path of solvers of d(x / alpha) / d(sigma / alpha). Times may be fractional; s is interpolated."""
    table, steps_of_table = _table(schedule), np.arange(schedule.num_steps)
    t = _times(config, schedule.num_steps, steps)
    s = np.interp(t, steps_of_table, table)
    ramp = ramp_of(config, s[0], s[-1], steps)
    if ramp is not None:
        s, t = ramp, np.interp(np.log(ramp), np.log(table), steps_of_table)
    return _in_sigma(s, t, table[0] if config["final_sigmas_type"] == "sigma_min" else 0.0)


def _dpm_path(
    config: Mapping, schedule: DiscreteSchedule, steps: int, ends_on_ramp: bool = False, smooth_cosine: bool = False
) -> list[Step]:
    """The path of solvers in log(alpha / sigma). Times are whole; one more is computed, and the cleanest is left out.

    ends_on_ramp: take the least noise from the ramp of the config, else from the table.
    smooth_cosine: on a cosine schedule, truncate the times of a ramp instead of rounding them.
    """
    table = _table(schedule)
    too_noisy = int(np.searchsorted(-np.log(table[::-1]), config["lambda_min_clipped"]))
    t = np.round(_times(config, schedule.num_steps, steps, extra=1, skipped=too_noisy))
    s = np.interp(t, np.arange(len(table)), table)
    least_noisy = table[0]
    ramp = ramp_of(config, table[-1], table[0], steps)
    if ramp is not None:
        t = np.interp(np.log(ramp), np.log(table), np.arange(len(table)))
        near = config.get("use_karras_sigmas") or config.get("use_lu_lambdas")
        smooth = smooth_cosine and config.get("beta_schedule") == "squaredcos_cap_v2"
        s, t = ramp, np.round(t) if near and not smooth else np.trunc(t)
        least_noisy = ramp[-1] if ends_on_ramp else least_noisy
    return _in_sigma(s, t, 0.0 if config["final_sigmas_type"] == "zero" else least_noisy)


def _lowers_final_order(config: Mapping, steps: int) -> bool:
    """Whether to use order 1 for the last step, and 2 for the one before."""
    return config["lower_order_final"] and steps < FEW_STEPS


def _plain(solver: Callable[..., Plan]) -> Callable[..., Plan]:
    """A solver that has no settings."""
    return lambda config, schedule, grid, steps: solver(schedule, len(grid), grid)


def _pndm(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    return plms(schedule, len(grid), grid) if len(grid) > 1 else solvers.ddim(schedule, len(grid), grid)


def _lcm(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    """x' = alpha' (c_out x0 + c_skip x) + sigma' z, with the boundary condition of Luo et al. 2023, section 4.1."""

    def row(level: NoiseLevel, next: NoiseLevel) -> Row:
        t = level.t * config["timestep_scaling"]
        c_skip, c_out = 0.25 / (t**2 + 0.25), t / (t**2 + 0.25) ** 0.5
        return Row(level, next, next.alpha * (c_out * X0 + c_skip * state(level)) + next.sigma * Z)

    return stack(itertools.starmap(row, grid))


def _dpm_multistep(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    is_sde, order = config["algorithm_type"] == "sde-dpmsolver++", config["solver_order"]
    _check(config, "solver_order", (2, 1) if is_sde else (2, 1, 3))
    arguments = (schedule, len(grid), grid)
    if order == 1:
        return solvers.ddim(*arguments, eta=float(is_sde))
    lower_order_final = _lowers_final_order(config, steps)
    if order == 3:
        return solvers.dpmpp_3m(*arguments, lower_order_final=lower_order_final, curvature=1.0)
    return (solvers.dpmpp_2m_sde if is_sde else solvers.dpmpp_2m)(*arguments, lower_order_final=lower_order_final)


def _dpm_singlestep(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    """Pairs of steps, the last one alone where the order falls or the steps are odd."""
    if config["solver_order"] == 1:
        return solvers.ddim(schedule, len(grid), grid)
    solver = dpm_solver if config["algorithm_type"] == "dpmsolver" else solvers.dpmpp_2s
    first = (steps - len(grid)) % 2  # a pair of which an image's strength left out one
    last = len(grid) - bool(config["lower_order_final"] or steps % 2)
    parts = [part for part in (grid[:first], grid[first:last], grid[max(first, last) :]) if part]
    return joined([solver(schedule, len(part), part) for part in parts]) if parts else stack([])


def _unipc(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    variant = "bh1" if config.get("solver_type") == "bh1" else "bh2"
    return solvers.unipc(schedule, len(grid), grid, config["solver_order"], variant)


def _deis(config: Mapping, schedule: DiscreteSchedule, grid: list[Step], steps: int) -> Plan:
    return solvers.deis(
        schedule, len(grid), grid, config["solver_order"], lower_order_final=_lowers_final_order(config, steps)
    )


class Scheduler(NamedTuple):
    """What differs between the classes.

    path: (config, schedule, steps) -> the steps of the solver.
    solver: (config, schedule, steps of the path to run, number of steps) -> Plan.
    reads: the fields that the class reads, of those that matter here. Those of other classes are ignored.
    defaults: values of fields that the config leaves out, beside `DEFAULTS`.
    supported: field -> the values that can be used, the first one by default, beside `SUPPORTED`.
    """

    path: Callable[[Mapping, Schedule, int], list[Step]]
    solver: Callable[[Mapping, Schedule, list[Step], int], Plan]
    reads: frozenset[str]
    defaults: Mapping[str, Any] = MappingProxyType({})
    supported: Mapping[str, tuple] = MappingProxyType({})


def _reads(fields: str) -> frozenset[str]:
    return frozenset(f"_class_name prediction_type beta_schedule {fields}".split())


# fmt: off
BETAS = {"beta_start": 0.0001, "beta_end": 0.02}
DEFAULTS = {
    "timestep_spacing": "linspace", "steps_offset": 0, "set_alpha_to_one": True, "final_sigmas_type": "zero",
    "original_inference_steps": 50, "timestep_scaling": 10.0, "lambda_min_clipped": -np.inf,
    "algorithm_type": "dpmsolver++", "solver_order": 2, "lower_order_final": True,
}
FLAGS = ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "rescale_betas_zero_snr"]
OPTIONAL = {"sigma_min": 0.0, "sigma_max": 0.0, "shift_terminal": 0.0} | dict.fromkeys(FLAGS, False)  # may be null
SUPPORTED = {
    "thresholding": (False,), "use_flow_sigmas": (False,), "clip_sample": (False,), "euler_at_final": (False,),
    "interpolation_type": ("linear",), "timestep_type": ("discrete",), "predict_x0": (True,),
    "disable_corrector": ([],), "solver_p": (None,), "final_sigmas_type": ("zero", "sigma_min"),
}
SPACED = "timestep_spacing steps_offset"
RAMPS = f"{SPACED} use_karras_sigmas use_exponential_sigmas use_beta_sigmas sigma_min sigma_max"
ORDERED = f"{RAMPS} solver_order solver_type algorithm_type lower_order_final thresholding use_flow_sigmas"
DDIM = _reads(f"{SPACED} set_alpha_to_one thresholding clip_sample")
PNDM = _reads(f"{SPACED} set_alpha_to_one skip_prk_steps")
DDPM = _reads(f"{SPACED} variance_type thresholding clip_sample")
LCM = _reads("original_inference_steps timestep_scaling thresholding clip_sample")
EULER = _reads(f"{RAMPS} final_sigmas_type interpolation_type timestep_type")
UNRAMPED = _reads(SPACED)
HEUN = _reads(f"{RAMPS} clip_sample")
LMS = _reads(RAMPS)
MULTI = _reads(f"{ORDERED} use_lu_lambdas final_sigmas_type lambda_min_clipped variance_type euler_at_final")
SINGLE = _reads(f"{ORDERED} final_sigmas_type lambda_min_clipped variance_type") - set(SPACED.split())
UNIPC = _reads(f"{ORDERED} final_sigmas_type predict_x0 disable_corrector solver_p") - {"algorithm_type"}
DEIS = _reads(ORDERED) - {"solver_type", "algorithm_type"}

LEADING = {"timestep_spacing": "leading"}
CLIPPED = LEADING | {"clip_sample": True}
PRK = LEADING | {"skip_prk_steps": False, "set_alpha_to_one": False}
LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
DISTILLED = LATENT | {"beta_schedule": "scaled_linear"}
PAIRS = {"lower_order_final": False}
NOISY = {"final_sigmas_type": "sigma_min"}
PLMS = {"timestep_spacing": ("leading",), "skip_prk_steps": (True,), "prediction_type": ("epsilon",)}
SMALL = {"variance_type": ("fixed_small", "fixed_small_log")}
GIVEN = {"variance_type": (None,)}  # the network does not predict it
MIDPOINT = GIVEN | {"solver_type": ("midpoint", "bh1", "bh2", "logrho")}  # those of other classes mean midpoint
MULTISTEP = MIDPOINT | {"algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis")}
SINGLESTEP = MIDPOINT | {"solver_order": (2, 1), "algorithm_type": ("dpmsolver++", "dpmsolver", "deis")}
LOWERED = {"lower_order_final": (True,)}
EULER_A = _plain(solvers.euler_ancestral)
ON_RAMP = functools.partial(_dpm_path, ends_on_ramp=True)
SMOOTH = functools.partial(_dpm_path, smooth_cosine=True)
SCHEDULERS = {
    #                                            path         solver                 reads     defaults   supported
    "DDIMScheduler":                   Scheduler(_table_path, _plain(solvers.ddim),  DDIM,     CLIPPED),
    "PNDMScheduler":                   Scheduler(_table_path, _pndm,                 PNDM,     PRK,       PLMS),
    "DDPMScheduler":                   Scheduler(_ddpm_path,  _plain(solvers.ddpm),  DDPM,     CLIPPED,   SMALL),
    "LCMScheduler":                    Scheduler(_lcm_path,   _lcm,                  LCM,      DISTILLED),
    "EulerDiscreteScheduler":          Scheduler(_euler_path, _plain(solvers.euler), EULER),
    "EulerAncestralDiscreteScheduler": Scheduler(_euler_path, EULER_A,               UNRAMPED),
    "HeunDiscreteScheduler":           Scheduler(_euler_path, _plain(heun),          HEUN,     LATENT),
    "LMSDiscreteScheduler":            Scheduler(_euler_path, _plain(solvers.lms),   LMS),
    "DPMSolverMultistepScheduler":     Scheduler(SMOOTH,      _dpm_multistep,        MULTI,    {},        MULTISTEP),
    "DPMSolverSinglestepScheduler":    Scheduler(_dpm_path,   _dpm_singlestep,       SINGLE,   PAIRS,     SINGLESTEP),
    "UniPCMultistepScheduler":         Scheduler(ON_RAMP,     _unipc,                UNIPC,    {},        LOWERED),
    "DEISMultistepScheduler":          Scheduler(ON_RAMP,     _deis,                 DEIS,     NOISY),
}

FLOW_FIELDS = {
    "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential",
    "stochastic_sampling": False, "invert_sigmas": False,
}
NO_TERMINAL = FLOW_FIELDS | {"shift_terminal": None}
FLOW = _reads(f"{' '.join(NO_TERMINAL)} use_karras_sigmas use_exponential_sigmas use_beta_sigmas mu sigmas")
FLOW_HEUN = _reads("num_train_timesteps shift mu sigmas")
BY_SIZE = NO_TERMINAL | {"use_dynamic_shifting": None}  # where a pipeline gives mu
FORWARD = {"invert_sigmas": (False,), "time_shift_type": ("exponential", "linear")}
FLOWS = {  # of rectified flows: their schedule is `schedules.flow`, and their network predicts eps - x0
    "FlowMatchEulerDiscreteScheduler": Scheduler(flow_path,  flow_euler,           FLOW,  NO_TERMINAL,  FORWARD),
    "FlowMatchHeunDiscreteScheduler":  Scheduler(flow_path,  _plain(solvers.flow_heun), FLOW_HEUN, BY_SIZE),
}
# fmt: on
