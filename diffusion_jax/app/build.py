"""Config -> objects: the only place that turns strings into functions. Errors for unknown names list the known ones."""

import inspect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import codec as codecs
from diffusion_jax import conditioning as conditionings
from diffusion_jax.app import shipped
from diffusion_jax.app.agreement import check_network, check_updated
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
from diffusion_jax.interop.text import minilm
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.models import adapters
from diffusion_jax.models.adapters import Adapter
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.unet import UNet
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
    if "lora" in config:
        check_updated(unet, config.teacher)
    untrained = network_of(unet)
    return DiffusionModel(
        network=untrained,
        params=jax.eval_shape(untrained.init, jax.random.key(0)),
        schedule=schedule(config),
        parameterization=_parameterization(config),
        codec=codec,
        conditioning=told,
        size=size,
        adapter=adapter(config),
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
        config.safety_checker and not training,
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
    smoothing = {"time_smoothing": 0.0} if config.objective.prediction == "edm" else {}  # whose times are short
    return UNet(**(smoothing | _fields(config.model)))


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


def plan(config: ConfigDict, model: DiffusionModel, strength: float = 1.0) -> Plan:
    """The solver of config.sample as a plan. strength: how much of a starting image changes."""
    section = config.sample
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
    schedule = model.useful_schedule
    spacing = section.spacing or ("karras" if is_edm(model) and not model.network.flow_map else "trailing")
    if spacing in model.own_times:
        spacing = model.own_times[spacing](section.steps)
    left = solvers.strength_times(schedule, section.steps, strength, spacing)
    return solver(schedule, len(left), spacing=left, **options)


def is_consistency(config: ConfigDict) -> bool:
    """Whether the model goes to clean data at each call, so that no other solver suits it."""
    return config.sample.solver == "consistency"


def is_edm(model: DiffusionModel) -> bool:
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
