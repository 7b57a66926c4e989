"""Config -> objects: the only place where strings become functions. Unknown names raise with the known ones."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.core import process, schedules, solvers
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.core.solvers import Plan
from diffusion_jax.data import sources
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Transform, square, to_float
from diffusion_jax.interop.text import minilm
from diffusion_jax.models.autoencoder import AutoencoderKL, sample_moments
from diffusion_jax.models.discriminator import PatchDiscriminator
from diffusion_jax.models.lpips import load_lpips, lpips
from diffusion_jax.models.unet import UNet
from diffusion_jax.objectives.autoencoder import autoencoding
from diffusion_jax.objectives.denoising import TARGETS
from diffusion_jax.pipelines import Guidance
from diffusion_jax.pipelines import conditioning as conditionings
from diffusion_jax.pipelines.conditioning import Conditioning

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


def plan(config: ConfigDict) -> Plan:
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
    strength = section.strength if section.image and not section.mask else 1.0
    left = solvers.strength_times(schedule(config), section.steps, strength, section.spacing)
    table = solver(schedule(config), len(left), spacing=left, **options)
    return table if section.resample == 1 else solvers.with_resampling(table, section.resample)


def guidance(config: ConfigDict, conditioning: Conditioning) -> Guidance:
    """The guidance of config.sample."""
    section = config.sample
    negative = None
    if section.negative_prompt:
        negative = jax.tree.map(lambda leaf: leaf[0], conditioning.of_prompts([section.negative_prompt]))
    return Guidance(
        scale=section.guidance,
        negative=negative,
        phi=section.rescale,
        limits=section.guidance_interval if any(section.guidance_interval) else None,
        plus_plus=section.cfg_pp,
        percentile=section.dynamic_threshold or None,
    )


def conversion(config: ConfigDict) -> Callable:
    """What the network's output means."""
    return choose(process.CONVERSIONS, config.objective.prediction, "prediction")


def weight(config: ConfigDict) -> Callable:
    """The loss weight; checks the prediction's name too."""
    choose(TARGETS, config.objective.prediction, "prediction")
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


def unet(config: ConfigDict) -> UNet:
    """The U-Net of config.model."""
    return UNet(**_fields(config.model))


def autoencoder(config: ConfigDict) -> AutoencoderKL:
    """The untrained first stage of config.autoencoder."""
    return AutoencoderKL(**_fields(config.autoencoder.model))


def _fields(section: ConfigDict) -> dict:
    """The section as arguments of a Flax module, its dtype by name."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
    return fields | {"dtype": choose(DTYPES, fields.get("dtype", "float32"), "dtype")}


def unet_inputs(cond: PyTree) -> dict:
    """A condition as the U-Net's keyword arguments."""
    return {
        "encoder_hidden_states": cond.get("text"),
        "encoder_attention_mask": cond.get("mask"),
        "class_labels": cond.get("label"),
    }


def network_apply(model: UNet) -> Callable:
    """The U-Net as apply(params, x, t, cond, key=None); with a key, dropout is on. Equal for equal models."""
    return _Apply(model)


@dataclass(frozen=True)
class _Apply:
    model: UNet

    def __call__(self, params: PyTree, x, t, cond: PyTree, key=None):
        rngs = None if key is None else {"dropout": key}
        return self.model.apply(params, x, t, **unet_inputs(cond), deterministic=key is None, rngs=rngs)


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
