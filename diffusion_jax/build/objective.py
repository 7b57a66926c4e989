"""Config -> what training minimises, and the optimizer."""

import functools
from collections.abc import Callable

import jax
import optax
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict
from optax import contrib

from diffusion_jax.build.agreement import check_teacher
from diffusion_jax.build.choice import choose
from diffusion_jax.build.sampling import is_edm
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.adapters import WHOLE
from diffusion_jax.models.autoencoder import AutoencoderKL, sample_moments
from diffusion_jax.models.discriminator import PatchDiscriminator
from diffusion_jax.models.vision.lpips import lpips
from diffusion_jax.objectives import few_step_methods, flow_map, levels
from diffusion_jax.objectives.autoencoding import autoencoding
from diffusion_jax.objectives.denoising import denoising, frozen_parts

LEVELS = {
    "uniform": levels.uniform,
    "even": levels.even,
    "laplace": levels.laplace,
    "lognormal": levels.lognormal,
    "lognormal_ect": functools.partial(levels.lognormal, mean=-1.1, std=2.0),  # Geng et al. 2024
    "lognormal_scm": functools.partial(levels.lognormal, mean=-1.0, std=1.4),  # Lu & Song 2024
    "lognormal_jit": functools.partial(levels.lognormal, mean=0.8, std=0.8),  # Li & He 2025
    "logit_normal": levels.logit_normal,
}
WEIGHTS = {
    "uniform": levels.uniform_weight,
    "relative": levels.relative_weight,
    "inverse_noise": levels.inverse_noise_weight,
    "velocity": levels.velocity_weight,
    "min_snr": levels.min_snr_weight,
    "truncated": levels.truncated_snr_weight,
}
FLOW_MAPS = {
    "consistency_training": lambda section: few_step_methods.consistency_training(section.shrinks),
    "soflow": lambda section: few_step_methods.soflow(section.shrinks),
    "shortcut": lambda section: few_step_methods.shortcut(),
    "mean_flow": lambda section: few_step_methods.mean_flow(),
    "improved_mean_flow": lambda section: few_step_methods.improved_mean_flow(),
    "continuous_consistency": lambda section: few_step_methods.continuous_consistency(section.warm_up),
    "lagrangian": lambda section: few_step_methods.lagrangian(),
}
CLEAN_TARGET_METHODS = (  # an ordinary network can learn these
    "consistency_training",
    "continuous_consistency",
    "consistency_distillation",
    "guidance_distillation",
)
PATH_METHODS = (
    "consistency_training",
    "soflow",
    "mean_flow",
    "improved_mean_flow",
    "continuous_consistency",
)  # these follow a path
GUIDED_BY_THEMSELVES = ("mean_flow", "improved_mean_flow")  # without a teacher, with objective.scale
DISTILLATIONS = {
    "distillation": lambda section: few_step_methods.distillation(section.segments),
    "consistency_distillation": lambda section: few_step_methods.consistency_distillation(section.segments),
    "guidance_distillation": lambda section: few_step_methods.guidance_distillation(),
}
SCALED = (*DISTILLATIONS, *GUIDED_BY_THEMSELVES)  # these may learn guidance
EMPHASIS = {  # method -> levels and weight by default; for one call, even levels are better than lognormal ones
    **{name: ("lognormal_scm", "relative") for name in FLOW_MAPS},
    "consistency_training": ("lognormal_ect", "inverse_noise"),
    **{name: ("even", "relative") for name in DISTILLATIONS},
}


def objective(
    section: ConfigDict,
    model: DiffusionModel | AutoencoderKL,
    key: Key[Array, ""],
    steps: int = 1,
    teacher: DiffusionModel | None = None,
    start: Callable[[Key[Array, ""]], PyTree] | None = None,
) -> tuple[Callable, PyTree, dict]:
    """What a training stage needs: (loss, initial params, frozen inputs).

    section: config.objective for a DiffusionModel, config.autoencoder.loss for a first stage.
    steps: of the training.
    teacher: a trained model, from which distillation learns.
    start: key -> the network's variables before training, random ones if None.
    Raises ValueError for objectives that do not fit the model or its teacher.
    """
    if isinstance(model, AutoencoderKL):
        return choose({"autoencoding": _autoencoding}, section.name, "objective")(section, model, key)
    method = choose({"denoising": None} | FLOW_MAPS | DISTILLATIONS, section.name, "objective")
    if method is None and teacher is not None and model.adapter == WHOLE:
        raise ValueError("objective.name=denoising has no teacher: leave out config.teacher")
    if method is None and model.network.flow_map:
        raise ValueError(
            "objective.name=denoising trains a network without an input for the level where a step ends: set "
            f"model.target_embedding=False, or objective.name to one of {', '.join(FLOW_MAPS | DISTILLATIONS)}"
        )
    if method is None and model.network.takes_scale:
        raise ValueError(
            "objective.name=denoising trains a network without an input for the guidance scale: set "
            f"model.time_cond_proj_dim=None, or objective.name to one of {', '.join(SCALED)}"
        )
    loss = _flow_map(section, model, steps, method(section), teacher) if method else _denoising(section, model)
    params, frozen_params = model.adapter.split((start or model.network.init)(key), key)
    frozen = frozen_parts(model, frozen_params)
    return loss, params, frozen | ({"teacher": teacher.params} if learns_from_teacher(section) else {})


def learns_from_teacher(section: ConfigDict) -> bool:
    """Whether the targets of config.objective come from a trained model."""
    return section.name in DISTILLATIONS or section.taught


def _denoising(section: ConfigDict, model: DiffusionModel) -> Callable:
    chosen = _emphasis(section.levels or ("lognormal" if is_edm(model) else "uniform"), section.weight or "uniform")
    return denoising(model, chosen.weight, section.drop, chosen.levels)


def emphasis(method: str, levels: str = "", weight: str = "") -> flow_map.Emphasis:
    """The levels and the weight of few-step training.

    method: gives the default of each.
    levels, weight: names, "" for the default.
    """
    default_levels, default_weight = EMPHASIS[method]
    return _emphasis(levels or default_levels, weight or default_weight)


def _emphasis(levels: str, weight: str) -> flow_map.Emphasis:
    return flow_map.Emphasis(
        choose(LEVELS, levels, "distribution of noise levels"), choose(WEIGHTS, weight, "loss weight")
    )


def _flow_map(
    section: ConfigDict, model: DiffusionModel, steps: int, method: flow_map.Method, teacher: DiffusionModel | None
) -> Callable:
    if not model.network.flow_map and section.name not in CLEAN_TARGET_METHODS:
        raise ValueError(
            f"objective.name={section.name} needs a network with an input for the level where a step ends: set "
            f"model.target_embedding=True, or train by {', '.join(CLEAN_TARGET_METHODS)}"
        )
    if section.taught and section.name not in PATH_METHODS:
        raise ValueError(
            "objective.taught is for the methods that follow a path from noise to data: "
            f"{', '.join(PATH_METHODS)}; got {section.name}"
        )
    guide = _guide(section, model, teacher)
    if learns_from_teacher(section) and teacher is None:
        raise ValueError(f"objective.name={section.name} learns from a trained model: set config.teacher to its folder")
    if teacher is not None:
        check_teacher(teacher, model)
    chosen = emphasis(section.name, section.levels, section.weight)
    return flow_map.flow_map(model, method, steps, section.drop, section.plain, section.robust, guide, chosen)


def _guide(
    section: ConfigDict, model: DiffusionModel, teacher: DiffusionModel | None
) -> flow_map.Teacher | flow_map.OwnGuidance | None:
    """Where the guidance that is built in comes from."""
    is_taught, is_guided = learns_from_teacher(section), section.scale != 1 or model.network.takes_scale
    if is_guided and not is_taught and section.name not in GUIDED_BY_THEMSELVES:
        raise ValueError(
            "objective.scale and model.time_cond_proj_dim are for what is learned from a guided teacher: set "
            f"objective.taught=True, or objective.name to one of {', '.join(SCALED)}; got {section.name}"
        )
    if model.network.takes_scale and section.scale <= 1:
        raise ValueError(
            "a network with model.time_cond_proj_dim learns the guidance scales from 1 to objective.scale: set "
            f"objective.scale to more than 1, got {section.scale:g}"
        )
    if model.network.takes_interval and is_taught:
        raise ValueError(
            f"model.interval_embedding is for {' and '.join(GUIDED_BY_THEMSELVES)} without a teacher: set it to False"
        )
    if is_taught:
        return flow_map.Teacher(teacher, section.scale, section.taught)
    if not is_guided:
        return None
    for unfit, field, value in (
        (not model.conditioning.null, "config.condition.kind", "class or text, as guidance needs a condition"),
        (section.scale <= 0, "objective.scale", "more than 0"),
        (not section.plain, "objective.plain", "more than 0, for the student's own velocity"),
        (not section.drop, "objective.drop", "more than 0, for its velocity without the condition"),
    ):
        if unfit:
            raise ValueError(f"{section.name} with guidance learned from itself: set {field} to {value}")
    return flow_map.OwnGuidance(section.scale)


def _autoencoding(section: ConfigDict, model: AutoencoderKL, key: Key[Array, ""]) -> tuple[Callable, PyTree, dict]:
    keys = jax.random.split(key)
    params, frozen = {"autoencoder": jax.jit(model.init)(keys[0], model.example_image())}, {}
    perceptual = discriminate = None
    if section.perceptual:
        perceptual, frozen["perceptual"] = lpips, load_lpips(section.perceptual_net)
    if section.adversarial:
        discriminator = PatchDiscriminator()
        example = discriminator.example_image()
        discriminate, params["discriminator"] = discriminator.apply, jax.jit(discriminator.init)(keys[1], example)
    loss = autoencoding(
        functools.partial(model.apply, method="encode"),
        sample_moments,
        functools.partial(model.apply, method="decode"),
        perceptual,
        discriminate,
        section.to_dict(),
    )
    return loss, params, frozen


def optimizer(section: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon with the learning rate of `learning_rate`, and gradients clipped by their global norm."""
    kind = choose({"adamw": _adamw, "muon": _muon}, section.kind, "optimizer")
    return optax.chain(optax.clip_by_global_norm(section.clip), kind(section, learning_rate(section, steps)))


def learning_rate(section: ConfigDict, steps: int) -> optax.Schedule:
    """Number of updates -> the rate of the next one: a warm-up, then constant or decayed by a cosine."""
    decays = {
        "constant": lambda: optax.constant_schedule(section.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(section.learning_rate, max(steps - section.warmup, 1)),
    }
    return optax.join_schedules(
        [optax.linear_schedule(0.0, section.learning_rate, section.warmup), choose(decays, section.decay, "decay")()],
        [section.warmup],
    )


def _adamw(section: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=section.b1, b2=section.b2, weight_decay=section.weight_decay)


def _muon(section: ConfigDict, rate: optax.Schedule) -> optax.GradientTransformation:
    """Muon (Jordan 2024) for the kernels, convolutions as matrices of (height·width·in, out), and AdamW with
    Nesterov's momentum for the rest. Updates of kernels have the size of AdamW's (Liu et al. 2025, section 2.2), so
    that one learning rate serves both.
    """

    def dimensions(path, leaf):
        is_kernel = path[-1].key == "kernel"
        return contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1) if is_kernel else None

    return contrib.muon(
        rate,
        weight_decay=section.weight_decay,
        adam_b1=section.b1,
        adam_b2=section.b2,
        adam_weight_decay=section.weight_decay,
        muon_weight_dimension_numbers=functools.partial(jax.tree_util.tree_map_with_path, dimensions),
        consistent_rms=0.2,
    )
