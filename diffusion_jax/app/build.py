"""Config -> objects: the only place that turns strings into functions. Errors for unknown names list the known ones."""

import functools
import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict
from optax import contrib

from diffusion_jax import codec as codecs
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import shipped
from diffusion_jax.app.agreement import check_network
from diffusion_jax.codec import Codec, check_size
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.core import parameterization, schedules, solvers
from diffusion_jax.core.guidance import Guidance
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers import Plan
from diffusion_jax.data import sources, transforms
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Transform, crop
from diffusion_jax.interop import PublishedPipeline, load_pipeline
from diffusion_jax.interop.folders import autoencoder_of, read_config
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.interop.text import minilm
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.models import adapters
from diffusion_jax.models.adapters import Adapter
from diffusion_jax.models.autoencoder import AutoencoderKL, sample_moments
from diffusion_jax.models.discriminator import PatchDiscriminator
from diffusion_jax.models.lpips import lpips
from diffusion_jax.models.unet import UNet
from diffusion_jax.objectives import levels
from diffusion_jax.objectives.autoencoding import autoencoding
from diffusion_jax.objectives.denoising import denoising, frozen_parts
from diffusion_jax.pipelines.published import from_published

SCHEDULES = {
    "linear": lambda section: schedules.linear(section.T),
    "scaled_linear": lambda section: schedules.scaled_linear(section.T),
    "cosine": lambda section: schedules.cosine(section.T),
    "sigmoid": lambda section: schedules.sigmoid(section.T),
    "flow": lambda section: schedules.flow(section.shift),
    "edm": lambda section: schedules.edm(section.sigma_min, section.sigma_max),
}
PARAMETERIZATIONS = {name: lambda section, value=value: value for name, value in parameterization.NAMED.items()} | {
    "edm": lambda section: parameterization.edm(section.sigma_data)
}
SOLVERS = {
    name: getattr(solvers, name)
    for name in (
        *("ddpm", "ddim", "euler", "euler_ancestral", "consistency", "heun", "dpm_solver", "dpmpp_1", "dpmpp_2s"),
        *("dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "unipc", "deis", "plms", "lms"),
    )
}
LEVELS = {
    "uniform": levels.uniform,
    "laplace": levels.laplace,
    "lognormal": levels.lognormal,
    "logit_normal": levels.logit_normal,
}
WEIGHTS = {
    "uniform": levels.uniform_weight,
    "min_snr": levels.min_snr_weight,
    "truncated": levels.truncated_snr_weight,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def choose(table: dict, name: str, what: str):
    """table[name], or a ValueError that lists the known names."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


def has_denoiser(config: ConfigDict) -> bool:
    """Whether the config has more than a first stage."""
    return "model" in config or "checkpoint" in config


def model(config: ConfigDict, sides: tuple[int, int] = (0, 0), training: bool = False) -> DiffusionModel:
    """The model that a config describes, or the model of its checkpoint.

    The weights of a config's own model are only shapes yet; `weights.load` and training fill them in.

    sides: height and width of its images, pixels; 0 for data.size, and where that is 0 for the checkpoint's own size.
    training: make a checkpoint's variables float32, and use config.remat.
    Raises ValueError and FileNotFoundError for what cannot be built or loaded.
    """
    if "checkpoint" in config:
        return _published_model(config, sides, training)
    unet, codec, told = network(config), _untrained_codec(config), conditioning(config)
    size = tuple(side or config.data.size for side in sides)
    check_size(size, codec.factor)
    check_network(unet, codec.channels, told.null)
    untrained = network_of(unet)
    return DiffusionModel(
        network=untrained,
        params=jax.eval_shape(untrained.init, jax.random.key(0)),
        schedule=schedule(config),
        parameterization=_parameterization(config),
        codec=codec,
        conditioning=told,
        size=size,
    )


def _published_model(config: ConfigDict, sides: tuple[int, int], training: bool) -> DiffusionModel:
    loaded, dtype = published(config, training), choose(DTYPES, config.dtype, "dtype")
    unet = loaded.unet.module
    if training and unet.in_channels > unet.out_channels:
        raise ValueError(f"{config.checkpoint} is an inpainting model, which cannot be fine-tuned here")
    if training and config.remat:
        loaded = loaded._replace(unet=loaded.unet._replace(module=unet.clone(remat=True)))
    sides = tuple(side or config.data.size for side in sides)
    return from_published(loaded, sides, dtype, config.sample.tile)._replace(adapter=adapter(config))


def published(config: ConfigDict, training: bool = False) -> PublishedPipeline:
    """The checkpoint of a config with the LoRAs it names.

    training: float32 variables, unless only a LoRA is trained.
    """
    if not config.checkpoint:
        raise ValueError("config.checkpoint is empty: name a diffusers folder or a .safetensors file")
    dtype = choose(DTYPES, config.dtype, "dtype")
    loaded = load_pipeline(
        config.checkpoint,
        jnp.float32 if training and "lora" not in config else dtype,
        config.prediction or None,
        config.tokenizers or None,
        config.allow_pickle,
    )
    for file in config.loras:
        loaded = merge_lora(loaded, *_file_and_scale(file))
    return loaded


def _file_and_scale(file: str) -> tuple[str, float]:
    """FILE or FILE@SCALE."""
    path, _, scale = file.rpartition("@")
    if not path:
        return file, 1.0
    try:
        number = float(scale)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"config.loras: expected FILE or FILE@SCALE with a finite number, got {file!r}")
    return path, number


def adapter(config: ConfigDict) -> Adapter:
    """Which variables of a network the config trains."""
    if "lora" not in config:
        return adapters.WHOLE
    return adapters.lora(config.lora.rank, lora_scale(config), config.lora.targets)


def lora_scale(config: ConfigDict) -> float:
    """alpha / rank of config.lora."""
    return config.lora.alpha / max(config.lora.rank, 1)


def network(config: ConfigDict) -> UNet:
    """The untrained network of config.model."""
    return UNet(**_fields(config.model))


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The untrained first stage of config.autoencoder."""
    return AutoencoderKL(**_fields(config.autoencoder.model))


def _fields(section: ConfigDict) -> dict:
    """The section as arguments of a Flax module, with its dtype from a name."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    return fields | {"dtype": choose(DTYPES, fields.get("dtype", "float32"), "dtype")}


def _untrained_codec(config: ConfigDict) -> Codec:
    """The codec of config.autoencoder; the weights of an autoencoder are only shapes yet."""

    def untrained() -> Codec:
        own = config.autoencoder.checkpoint
        module = autoencoder_of(*read_config(shipped.find(own)))[0] if own else autoencoder(config)
        shapes = jax.eval_shape(module.init, jax.random.key(0), module.example_image())
        return codecs.autoencoder_kl(module, shapes, config.sample.tile)

    return choose({"identity": codecs.identity, "kl": untrained}, config.autoencoder.kind, "autoencoder kind")()


def conditioning(config: ConfigDict) -> Conditioning:
    """The condition of the denoiser, from config.condition."""
    kinds = {
        "none": conditionings.unconditional,
        "class": lambda: conditionings.class_labels(config.condition.num_classes),
        "text": lambda: conditionings.text(minilm(config.condition.length), config.condition.pooled),
    }
    return choose(kinds, config.condition.kind, "condition kind")()


def _parameterization(config: ConfigDict) -> Parameterization:
    return choose(PARAMETERIZATIONS, config.objective.prediction, "prediction")(config.objective)


def schedule(config: ConfigDict) -> Schedule:
    """The noise schedule of config.schedule."""
    section = config.schedule
    if section.name == "laplace":
        raise ValueError(
            "laplace is a distribution of noise levels in training, not a schedule: set "
            "objective.levels to laplace, and schedule.name to cosine"
        )
    chosen = choose(SCHEDULES, section.name, "schedule")(section)
    if not section.zero_terminal_snr:
        return chosen
    if config.objective.prediction == "eps":
        raise ValueError(
            "schedule.zero_terminal_snr starts from pure noise, where eps does not determine the image: set "
            "objective.prediction to v or x0"
        )
    return schedules.zero_terminal_snr(chosen)


def plan(config: ConfigDict, model: DiffusionModel) -> Plan:
    """The solver of config.sample as a plan. With a starting image it begins at config.sample.strength."""
    section = config.sample
    strength = section.strength if section.image and not section.mask else 1.0
    own = model.own_plans.get(section.solver)
    table = _plan(section, model, strength) if own is None else _own_plan(section, own, strength)
    return table if section.resample == 1 else solvers.with_resampling(table, section.resample)


def _own_plan(section: ConfigDict, own: Callable[[int, float], Plan], strength: float) -> Plan:
    for name in ("order", "eta", "spacing"):
        if section[name] not in (None, ""):
            raise ValueError(
                f"sample.{name}: solver={section.solver} is as the model's authors set it, got {name}={section[name]}; "
                "leave it out, or choose another solver"
            )
    return own(section.steps, strength)


def _plan(section: ConfigDict, model: DiffusionModel, strength: float) -> Plan:
    solver, options = choose(SOLVERS | dict(model.own_plans), section.solver, "solver"), {}
    for name in ("order", "eta"):
        if section[name] is not None:
            able = sorted(known for known, f in SOLVERS.items() if name in inspect.signature(f).parameters)
            if section.solver not in able:
                raise ValueError(
                    f"sample.{name}: the solver {section.solver} has none; those with it: {', '.join(able)}"
                )
            options[name] = section[name]
    schedule, spacing = model.useful_schedule, section.spacing or ("karras" if _is_edm(model) else "trailing")
    if spacing in model.own_times:
        spacing = model.own_times[spacing](section.steps)
    left = solvers.strength_times(schedule, section.steps, strength, spacing)
    return solver(schedule, len(left), spacing=left, **options)


def _is_edm(model: DiffusionModel) -> bool:
    """Whether the schedule's time is sigma itself, for which steps even in time are a bad choice."""
    return isinstance(model.schedule, schedules.EDMSchedule)


def guidance(config: ConfigDict, negative: PyTree) -> Guidance:
    """The guidance of config.sample. negative: the condition of its negative prompt, or None."""
    section = config.sample
    return Guidance(
        scale=section.guidance,
        negative=negative,
        rescale=section.rescale,
        interval=tuple(map(float, section.guidance_interval)) if any(section.guidance_interval) else None,
        cfg_pp=section.cfg_pp,
        dynamic_threshold=section.dynamic_threshold or None,
    )


def source(config: ConfigDict, split: str, size: int) -> Source:
    """The records of config.data.

    split: "train", "validation" or "first_stage"; data.splits has the source's name for it.
    size: of images, pixels on a side, for sources with a choice.
    """
    data = config.data
    name = data.splits[split]
    if data.source == "emoji":
        return sources.emoji(size, name, data.data_dir or None, data.styles, data.concepts)
    if data.source == "digits":
        return sources.digits(name)
    if data.source == "folder":
        if not data.path:
            raise ValueError("config.data.path is empty: name the folder of pictures of data.source=folder")
        return sources.folder(data.path)
    if data.source.startswith("tfds:"):
        return sources.tfds_source(data.source.removeprefix("tfds:"), name, data.data_dir or None)
    raise ValueError(f"unknown data source {data.source!r}; known: emoji, digits, folder, tfds:NAME")


def transform(config: ConfigDict, size: tuple[int, int], flip: bool = False) -> Transform:
    """The crop to `size` and the flip of config.data. flip: mirror half of the images even if config.data does not."""
    data = config.data
    return crop(*size, random_crop=data.random_crop, flip=data.flip or flip, upscale=data.upscale)


def variants(config: ConfigDict, size: tuple[int, int]) -> Transform:
    """All augmented versions of an image, for a cache: data.crops random crops or the centre crop, each also mirrored
    if data.flip is set. Time and disk space grow with their number.
    """
    data = config.data
    one = crop(*size, random_crop=data.random_crop, upscale=data.upscale)
    return transforms.variants(one, data.crops if data.random_crop else 1, data.flip)


def batches(source: Source, train: ConfigDict, seed: int, transform: Transform | None = None):
    """This host's share of the shuffled endless batches of a source."""
    return loader(
        source,
        train.batch_size // jax.process_count(),
        seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        transform=transform,
    )


def objective(
    section: ConfigDict, model: DiffusionModel | AutoencoderKL, key: Key[Array, ""]
) -> tuple[Callable, PyTree, dict]:
    """(loss, initial params, frozen inputs) of a training stage.

    section: config.objective for a DiffusionModel, config.autoencoder.loss for a first stage.
    """
    known = OBJECTIVES if isinstance(model, DiffusionModel) else FIRST_STAGE_OBJECTIVES
    return choose(known, section.name, "objective")(section, model, key)


def _denoising(section: ConfigDict, model: DiffusionModel, key: Key[Array, ""]) -> tuple[Callable, PyTree, dict]:
    weight = choose(WEIGHTS, section.weight, "loss weight")
    name = section.levels or ("lognormal" if _is_edm(model) else "uniform")
    loss = denoising(model, weight, section.drop, choose(LEVELS, name, "distribution of noise levels"))
    params, rest = model.adapter.split(model.network.init(key), key)
    return loss, params, frozen_parts(model, rest)


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


OBJECTIVES = {"denoising": _denoising}
FIRST_STAGE_OBJECTIVES = {"autoencoding": _autoencoding}


def optimizer(section: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon with warm-up, a constant or cosine-decayed rate, and gradients clipped by their global norm."""
    after = {
        "constant": lambda: optax.constant_schedule(section.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(section.learning_rate, max(steps - section.warmup, 1)),
    }
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, section.learning_rate, section.warmup), choose(after, section.decay, "decay")()],
        [section.warmup],
    )
    kind = choose({"adamw": _adamw, "muon": _muon}, section.kind, "optimizer")
    return optax.chain(optax.clip_by_global_norm(section.clip), kind(section, rate))


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
