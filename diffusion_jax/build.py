"""Config -> objects: the only place where strings become functions. Unknown names raise with the known ones."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.app.agreement import check_network
from diffusion_jax.core import process, schedules, solvers
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers import Plan
from diffusion_jax.data import sources
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Transform, square, to_float
from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.folders import autoencoder_of, read_config
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.text import minilm
from diffusion_jax.models.autoencoder import AutoencoderKL, sample_moments
from diffusion_jax.models.denoiser import Denoiser
from diffusion_jax.models.discriminator import PatchDiscriminator
from diffusion_jax.models.lpips import load_lpips, lpips
from diffusion_jax.models.unet import UNet
from diffusion_jax.objectives.autoencoder import autoencoding
from diffusion_jax.pipelines import Guidance, Pipeline
from diffusion_jax.pipelines import conditioning as conditionings
from diffusion_jax.pipelines.codec import Codec, check_size
from diffusion_jax.pipelines.conditioning import Conditioning
from diffusion_jax.pipelines.published import from_published, published_times

SCHEDULES = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "laplace": schedules.laplace,
}
SOLVERS = {
    name: getattr(solvers, name)
    for name in (
        *("ddpm", "ddim", "euler", "euler_ancestral", "consistency", "heun", "dpm_solver", "dpmpp_1", "dpmpp_2s"),
        *("dpmpp_2m", "dpmpp_3m", "dpmpp_sde", "dpmpp_2m_sde", "unipc", "deis", "plms", "lms"),
    )
}
WEIGHTS = {
    "uniform": process.uniform_weight,
    "min_snr": process.min_snr_weight,
    "truncated": process.truncated_snr_weight,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def choose(table: dict, name: str, what: str):
    """table[name], or a ValueError that lists the known names."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(sorted(table))}")
    return table[name]


class Lora(NamedTuple):
    """A LoRA to be trained: its rank, the scale alpha / rank and which linear maps it updates, see `models.lora`."""

    rank: int
    scale: float
    targets: str


class Model(NamedTuple):
    """A denoiser and what belongs to it, from the config's own sections or from a published checkpoint.

    unet; params: its variables, None where the work directory has them or is to have them. prediction: "eps", "x0", "v"
    or "flow". codec: None where the first stage is the work directory's. size: height and width of images in pixels.
    published: what was loaded from config.checkpoint, or None. lora: what is trained in place of params, or None.
    """

    unet: UNet
    params: PyTree
    schedule: Schedule
    prediction: str
    conditioning: Conditioning
    codec: Codec | None
    size: tuple[int, int]
    published: PublishedPipeline | None
    lora: Lora | None


def has_denoiser(config: ConfigDict) -> bool:
    """Whether the config has more than a first stage."""
    return "model" in config or "checkpoint" in config


def model(config: ConfigDict, training: bool = False) -> Model:
    """The model that a config describes or that its checkpoint holds.

    training: for images of data.size, the checkpoint's own size where that is 0, and with float32 variables; else for
    sample.height and sample.width, data.size where they are 0. Raises ValueError and FileNotFoundError for what cannot
    be built or loaded.
    """
    if "checkpoint" in config:
        return _published_model(config, training)
    prediction = config.objective.prediction
    choose(process.CONVERSIONS, prediction, "prediction")
    unet, size = UNet(**_fields(config.model)), _size(config, config.data.size, training)
    factor, channels = _latent_shape(config)
    check_size(size, factor)
    told = conditioning(config)
    check_network(unet, channels, told.null)
    return Model(
        unet=unet,
        params=None,
        schedule=schedule(config),
        prediction=prediction,
        conditioning=told,
        codec=None,
        size=size,
        published=None,
        lora=None,
    )


def _published_model(config: ConfigDict, training: bool) -> Model:
    if not config.checkpoint:
        raise ValueError("config.checkpoint is empty: name a diffusers folder or a .safetensors file")
    dtype, lora = choose(DTYPES, config.dtype, "dtype"), None
    if "lora" in config:
        lora = Lora(config.lora.rank, config.lora.alpha / max(config.lora.rank, 1), config.lora.targets)
    published = load_pipeline(
        config.checkpoint,
        jnp.float32 if training and lora is None else dtype,
        config.prediction or None,
        config.tokenizers or None,
        config.allow_pickle,
    )
    for file in config.loras:
        published = merge_lora(published, *_file_and_scale(file))
    unet, autoencoder = published.unet.module, published.autoencoder.module
    if training and unet.in_channels > unet.out_channels:
        raise ValueError(f"{config.checkpoint} fills in parts of an image; such a model cannot be fine-tuned here")
    side = config.data.size or unet.sample_size * 2 ** (len(autoencoder.block_out_channels) - 1)
    size = _size(config, side, training)
    pipeline, conditioning = from_published(published, size, dtype, config.sample.tile)
    return Model(
        unet=unet.clone(dtype=dtype, remat=training and config.remat),
        params=published.unet.params,
        schedule=published.schedule,
        prediction=published.prediction,
        conditioning=conditioning,
        codec=pipeline.codec,
        size=size,
        published=published,
        lora=lora,
    )


def _file_and_scale(file: str) -> tuple[str, float]:
    """FILE or FILE@SCALE."""
    path, _, scale = file.rpartition("@")
    if not path:
        return file, 1.0
    try:
        return path, float(scale)
    except ValueError:
        raise ValueError(f"config.loras: expected FILE or FILE@SCALE with a number, got {file!r}") from None


def _size(config: ConfigDict, side: int, training: bool) -> tuple[int, int]:
    return (side, side) if training else (config.sample.height or side, config.sample.width or side)


def _latent_shape(config: ConfigDict) -> tuple[int, int]:
    """Pixels of a side for one cell of x0, and the channels of x0, as config.autoencoder makes it."""
    section = config.autoencoder

    def of_latents() -> tuple[int, int]:
        module = autoencoder_of(*read_config(section.checkpoint))[0] if section.checkpoint else autoencoder(config)
        return 2 ** (len(module.block_out_channels) - 1), module.latent_channels

    return choose({"identity": lambda: (1, 3), "kl": of_latents}, section.kind, "autoencoder kind")()


def pipeline(model: Model, params: PyTree, codec: Codec) -> Pipeline:
    """The model with these variables and this first stage, ready to sample from."""
    unet, convert = model.unet, process.CONVERSIONS[model.prediction]
    fills = unet.in_channels > unet.out_channels
    return Pipeline(Denoiser(unet), params, convert, codec, model.conditioning.null, model.size, fills)


def schedule(config: ConfigDict) -> Schedule:
    """The noise schedule of config.schedule."""
    section = config.schedule
    if section.name == "flow":
        return schedules.flow(section.shift)
    if section.name not in SCHEDULES:
        raise ValueError(f"unknown schedule {section.name!r}; known: {', '.join(sorted([*SCHEDULES, 'flow']))}")
    chosen = SCHEDULES[section.name](section.T)
    if not section.zero_terminal_snr:
        return chosen
    if config.objective.prediction == "eps":
        raise ValueError(
            "schedule.zero_terminal_snr starts from noise alone, where eps says nothing of the image: set "
            "objective.prediction to v or x0"
        )
    return schedules.zero_terminal_snr(chosen)


def plan(config: ConfigDict, model: Model) -> Plan:
    """The solver of config.sample as a table, from where it starts on an image if there is one."""
    section = config.sample
    solver, options = choose(SOLVERS, section.solver, "solver"), {}
    for name in ("order", "eta"):
        if section[name] is not None:
            able = sorted(known for known, f in SOLVERS.items() if name in inspect.signature(f).parameters)
            if section.solver not in able:
                raise ValueError(
                    f"sample.{name}: the solver {section.solver} has none; those with it: {', '.join(able)}"
                )
            options[name] = section[name]
    spacing = section.spacing
    if spacing == "published":
        if model.published is None:
            raise ValueError("sample.spacing=published is for the model of a config.checkpoint; name another spacing")
        spacing = published_times(model.published, section.steps)
    strength = section.strength if section.image and not section.mask else 1.0
    left = solvers.strength_times(model.schedule, section.steps, strength, spacing)
    table = solver(model.schedule, len(left), spacing=left, **options)
    return table if section.resample == 1 else solvers.with_resampling(table, section.resample)


def guidance(config: ConfigDict, negative: PyTree) -> Guidance:
    """The guidance of config.sample. negative: the condition of its negative prompt, None where it has none."""
    section = config.sample
    return Guidance(
        scale=section.guidance,
        negative=negative,
        phi=section.rescale,
        limits=section.guidance_interval if any(section.guidance_interval) else None,
        plus_plus=section.cfg_pp,
        percentile=section.dynamic_threshold or None,
    )


def weight(config: ConfigDict) -> Callable:
    """The loss weight of config.objective."""
    return choose(WEIGHTS, config.objective.weight, "loss weight")


def source(config: ConfigDict, split: str) -> Source:
    """The records of config.data; split "train", "validation" or "first_stage", in the source's words data.splits."""
    data = config.data
    name = data.splits[split]
    if data.source == "openmoji":
        return sources.openmoji(data.size, name, data.data_dir or None)
    if data.source == "digits":
        return sources.digits(name)
    if data.source == "folder":
        return sources.folder(data.path)
    if data.source.startswith("tfds:"):
        return sources.tfds_source(data.source.removeprefix("tfds:"), name, data.data_dir or None)
    raise ValueError(f"unknown data source {data.source!r}; known: openmoji, digits, folder, tfds:NAME")


def transform(config: ConfigDict, flip: bool = False) -> Transform:
    """The crop and flip of config.data. flip: mirror half of the images even if config.data does not."""
    data = config.data
    return square(data.size, random_crop=data.random_crop, flip=data.flip or flip, upscale=data.upscale)


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


def conditioning(config: ConfigDict) -> Conditioning:
    """What the denoiser of config.condition is told."""
    kinds = {
        "none": conditionings.unconditional,
        "class": lambda: conditionings.class_labels(config.condition.num_classes),
        "text": lambda: conditionings.text(minilm(config.condition.length)),
    }
    return choose(kinds, config.condition.kind, "condition kind")()


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The untrained first stage of config.autoencoder."""
    return AutoencoderKL(**_fields(config.autoencoder.model))


def _fields(section: ConfigDict) -> dict:
    """The section as arguments of a Flax module, its dtype by name."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    return fields | {"dtype": choose(DTYPES, fields.get("dtype", "float32"), "dtype")}


def autoencoder_loss(config: ConfigDict, model: AutoencoderKL, seed: int) -> tuple[Callable, PyTree, PyTree]:
    """The first stage's loss, the parameters it trains and the pytree it reads: (loss, params, frozen)."""
    weights = config.autoencoder.loss
    image = jnp.zeros((1, config.data.size, config.data.size, 3))
    keys = jax.random.split(jax.random.key(seed))
    params, frozen = {"autoencoder": jax.jit(model.init)(keys[0], image)}, {}
    perceptual = discriminate = None
    if weights.perceptual:
        perceptual, frozen["perceptual"] = lpips, load_lpips(weights.perceptual_net)
    if weights.adversarial:
        discriminator = PatchDiscriminator()
        discriminate, params["discriminator"] = discriminator.apply, jax.jit(discriminator.init)(keys[1], image)
    loss = autoencoding(
        functools.partial(model.apply, method="encode"),
        sample_moments,
        functools.partial(model.apply, method="decode"),
        perceptual,
        discriminate,
        weights.to_dict(),
    )

    def on_pixels(params: PyTree, frozen: PyTree, batch: PyTree, keys):
        return loss(params, frozen, {"image": to_float(batch["image"])}, keys)

    return on_pixels, params, frozen


def optimizer(section: ConfigDict, steps: int) -> optax.GradientTransformation:
    """AdamW with warm-up, a constant or cosine-decayed rate, and gradients clipped by their global norm."""
    after = {
        "constant": lambda: optax.constant_schedule(section.learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(section.learning_rate, max(steps - section.warmup, 1)),
    }
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, section.learning_rate, section.warmup), choose(after, section.decay, "decay")()],
        [section.warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(section.clip),
        optax.adamw(rate, b1=section.b1, b2=section.b2, weight_decay=section.weight_decay),
    )
