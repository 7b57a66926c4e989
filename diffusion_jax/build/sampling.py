"""Config -> how images are sampled: plan and guidance."""

import inspect

from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import parallel
from diffusion_jax.build.choice import choose
from diffusion_jax.core import schedules, solvers
from diffusion_jax.core.guidance import Guidance, guided
from diffusion_jax.core.solvers import Plan
from diffusion_jax.model import DiffusionModel
from diffusion_jax.pipelines.generate import check_guidance

CONSISTENCY = "consistency"  # the solver whose every network call goes to clean data
SOLVERS = {
    name: getattr(solvers, name)
    for name in (
        *(
            "ddpm",
            "ddim",
            "euler",
            "euler_ancestral",
            CONSISTENCY,
            "heun",
            "flow_heun",
            "dpm_solver",
            "dpmpp_1",
            "dpmpp_2s",
        ),
        *("dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "unipc", "deis", "plms", "lms"),
    )
}
ROOM = 0.8  # of a device's memory for weights; the rest is for activations
OPTIONS = ("order", "eta", "floor")  # fields of config.sample that only some solvers have


def plan_and_guidance(
    config: ConfigDict, model: DiffusionModel, strength: float = 1.0, negative: PyTree = None
) -> tuple[Plan, Guidance]:
    """The solver and the guidance of config.sample. Raises ValueError for numbers out of range, and for settings that
    cannot be combined.

    strength: how much of a starting image changes.
    negative: the condition of the negative prompt, or None.
    """
    if has_guidance(config, model) and config.sample.guidance != 1:
        scale = "" if model.has_guidance else f" {config.objective.scale:g}"
        raise ValueError(
            f"this model has guidance{scale} built in: set sample.guidance to 1, got {config.sample.guidance:g}"
        )
    if model.network.takes_scale:
        _check_input(config.sample, model)
    table, rule = plan(config, model, strength), guidance(config, negative)
    guided(lambda x, level, cond: None, rule, model.conditioning.null, model.codec.limit)
    check_guidance(rule, table)
    return table, rule


def _check_input(section: ConfigDict, model: DiffusionModel) -> None:
    """Raise ValueError for what guidance has and a network that takes its scale as input has not."""
    names = ["negative_prompt", "rescale", "cfg_pp", "dynamic_threshold"]
    for name in names if model.network.takes_interval else [*names, "guidance_interval"]:
        value = section[name]
        if any(value) if isinstance(value, tuple) else value:
            raise ValueError(
                f"sample.{name}: this model takes the guidance scale as an input and is not guided: leave it out, got "
                f"{value!r}"
            )


def has_guidance(config: ConfigDict, model: DiffusionModel) -> bool:
    """Whether the model has guidance of one scale built in, because it was distilled from a guided teacher."""
    own = "objective" in config and config.objective.scale != 1 and not model.network.takes_scale
    return own or model.has_guidance


def in_turns(config: ConfigDict, model: DiffusionModel) -> bool:
    """Whether only the network that is in use is on the device: as config.sample.in_turns says, by default if all
    together take more than `ROOM` of its memory.
    """
    if config.sample.in_turns is not None:
        return config.sample.in_turns
    held = model.turns(1 if config.train.parallel == "pmap" else parallel.divisible(1))
    return sum(held.values()) > ROOM * parallel.machine().memory


def plan(config: ConfigDict, model: DiffusionModel, strength: float = 1.0) -> Plan:
    """The solver of config.sample as a plan.

    strength: in [0, 1]. How much of a starting image changes.
    """
    section = config.sample
    make = _published_plan if section.solver in model.published_solvers else _plan
    table = make(section, model, strength)
    return table if section.resample == 1 else solvers.with_resampling(table, section.resample)


def _published_plan(section: ConfigDict, model: DiffusionModel, strength: float) -> Plan:
    for name in (*OPTIONS, "spacing"):
        if section[name] not in (None, ""):
            raise ValueError(
                f"sample.{name}: solver={section.solver} is as the model's authors set it, got {name}={section[name]}; "
                "leave it out, or choose another solver"
            )
    return model.published_solvers[section.solver](section.steps, strength, model.size)


def _plan(section: ConfigDict, model: DiffusionModel, strength: float) -> Plan:
    solver, options = choose(SOLVERS | dict(model.published_solvers), section.solver, "solver"), {}
    for name in OPTIONS:
        if section[name] is not None:
            supporting = sorted(
                solver_name for solver_name, f in SOLVERS.items() if name in inspect.signature(f).parameters
            )
            if section.solver not in supporting:
                raise ValueError(
                    f"sample.{name}: the solver {section.solver} has none; those with it: {', '.join(supporting)}"
                )
            options[name] = section[name]
    schedule = model.useful_schedule
    whole_steps = section.solver == CONSISTENCY or model.network.flow_map  # the last one, too, is as long as others
    spacing = section.spacing or ("karras" if is_edm(model) and not whole_steps else "trailing")
    if spacing in model.published_times:
        spacing = model.published_times[spacing](section.steps, model.size)
    times = solvers.strength_times(schedule, section.steps, strength, spacing)
    return solver(schedule, len(times), spacing=times, **options)


def is_consistency(config: ConfigDict) -> bool:
    """Whether each network call goes to clean data. Such a model works with no other solver."""
    return config.sample.solver == CONSISTENCY


def is_edm(model: DiffusionModel) -> bool:
    """Whether the schedule's time is sigma itself. Steps even in time are then a bad choice."""
    return isinstance(model.schedule, schedules.EDMSchedule)


def guidance(config: ConfigDict, negative: PyTree) -> Guidance:
    """The guidance of config.sample.

    negative: the condition of its negative prompt, or None.
    """
    section = config.sample
    return Guidance(
        scale=section.guidance,
        negative=negative,
        rescale=section.rescale,
        interval=tuple(map(float, section.guidance_interval)) if any(section.guidance_interval) else None,
        cfg_pp=section.cfg_pp,
        dynamic_threshold=section.dynamic_threshold or None,
    )
