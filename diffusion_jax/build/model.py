"""Config -> the model: network, codec, conditioning, schedule, parameterization, adapter."""

import functools
import math
from collections.abc import Callable
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import codec as codecs
from diffusion_jax import conditioning as conditionings
from diffusion_jax import parallel, paths
from diffusion_jax.build import encoders, fields, shipped
from diffusion_jax.build.agreement import check_network, check_updated
from diffusion_jax.build.choice import DTYPES, choose
from diffusion_jax.codec import Codec, check_size
from diffusion_jax.conditioning import Conditioning, OfPrompts
from diffusion_jax.core import parameterization, schedules
from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.schedules import Schedule
from diffusion_jax.data.texts import kept
from diffusion_jax.interop import PublishedPipeline, load_pipeline
from diffusion_jax.interop.embeddings import add_embeddings
from diffusion_jax.interop.folders import autoencoder_of, read_config
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.pipeline import described
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.models import adapters
from diffusion_jax.models.adapters import Adapter
from diffusion_jax.models.applied import shapes_of
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.models.unet import UNet
from diffusion_jax.paths import Path
from diffusion_jax.pipelines.published import from_published, from_shapes

SCHEDULES = {
    "linear": lambda section: schedules.linear(section.T),
    "scaled_linear": lambda section: schedules.scaled_linear(section.T),
    "cosine": lambda section: schedules.cosine(section.T),
    "sigmoid": lambda section: schedules.sigmoid(section.T),
    "flow": lambda section: schedules.flow(section.shift),
    "edm": lambda section: schedules.edm(section.sigma_min, section.sigma_max),
}
NETWORKS = {"unet": UNet, "transformer": Transformer}
PARAMETERIZATIONS = {name: lambda section, value=value: value for name, value in parameterization.NAMED.items()} | {
    "edm": lambda section: parameterization.edm(section.sigma_data)
}


def has_denoiser(config: ConfigDict) -> bool:
    """Whether the config has more than a first stage."""
    return "model" in config or "checkpoint" in config


def diffusion_model(
    config: ConfigDict,
    sides: tuple[int, int] = (0, 0),
    training: bool = False,
    condition: Conditioning | None = None,
) -> DiffusionModel:
    """The model that a config describes, or the model of its checkpoint.

    Without a checkpoint the weights are only shapes. `weights.load` and training fill them in.

    sides: height and width of its images, pixels; 0 for data.size, and where that is 0 for the checkpoint's own size.
    training: make a checkpoint's variables float32, and use config.remat.
    condition: that of `conditioning`, if it is made already. A checkpoint has its own.
    Raises ValueError and FileNotFoundError for what cannot be built or loaded.
    """
    if "checkpoint" in config:
        return _published_model(config, sides, training)
    condition = condition or conditioning(config)
    module, codec = network(config, condition.null), _untrained_codec(config)
    untrained = network_of(module)
    size = tuple(side or config.data.size for side in sides)
    check_size(size, codec.factor * untrained.cell)
    check_network(module, codec.channels, condition.null)
    if "lora" in config:
        check_updated(module, config.teacher)
    return DiffusionModel(
        network=untrained,
        params=shapes_of(module),
        schedule=schedule(config),
        parameterization=_parameterization(config),
        codec=codec,
        conditioning=condition,
        size=size,
        adapter=adapter(config),
    )


def _published_model(config: ConfigDict, sides: tuple[int, int], training: bool) -> DiffusionModel:
    pipeline = published(config, training, stored=not training)
    convert = functools.partial(from_published, strategy="pmap" if training else config.train.parallel)
    return _of_pipeline(convert, pipeline, config, sides, training)


def described_model(config: ConfigDict, training: bool = True, sides: tuple[int, int] = (0, 0)) -> DiffusionModel:
    """The model of a checkpoint with shapes instead of weights. A checkpoint that is not here may be a short name, such
    as "sd15".

    Arguments as in `diffusion_model`.
    """
    is_here = paths.at(config.checkpoint).exists()
    pipeline = None if is_here else described(config.checkpoint, _weights_type(config, training))
    pipeline = pipeline or published(config, training, stored=True)
    return _of_pipeline(from_shapes, pipeline, config, sides, training)


def _weights_type(config: ConfigDict, training: bool) -> DTypeLike:
    """float32 for what is trained, config.dtype for what is not."""
    return jnp.float32 if training and "lora" not in config else choose(DTYPES, config.dtype, "dtype")


def _of_pipeline(
    convert: Callable[..., DiffusionModel],
    pipeline: PublishedPipeline,
    config: ConfigDict,
    sides: tuple[int, int],
    training: bool,
) -> DiffusionModel:
    denoiser, dtype = pipeline.denoiser, choose(DTYPES, config.dtype, "dtype")
    if training and denoiser.module.known_channels:
        raise ValueError(f"{config.checkpoint} is an inpainting model, which cannot be fine-tuned here")
    if training and config.remat:
        pipeline = pipeline.with_denoiser(denoiser._replace(module=denoiser.module.clone(remat=True)))
    sides = tuple(side or config.data.size for side in sides)
    return convert(pipeline, sides, dtype, config.sample.tile)._replace(adapter=adapter(config))


def published(config: ConfigDict, training: bool = False, stored: bool = False) -> PublishedPipeline:
    """The checkpoint of a config with the LoRAs, the learned words and the layers of its text encoder that it names.

    training: float32 variables, unless only a LoRA is trained.
    stored: leave them in their files until they are used.
    """
    if not config.checkpoint:
        raise ValueError("config.checkpoint is empty: name a diffusers folder or a .safetensors file")
    pipeline = load_pipeline(
        config.checkpoint,
        _weights_type(config, training),
        config.prediction or None,
        config.tokenizers or None,
        config.allow_pickle,
        config.safety_checker and not training,
        config.scan,
        {name: place for name in ("vae", "denoiser") if (place := config[name])},
        stored,
    )
    for file in config.loras:
        pipeline = merge_lora(pipeline, *_file_and_scale(file), config.allow_pickle)
    for file in config.embeddings:
        path, _, word = (file, "", "") if paths.at(file).is_file() or "@" not in file else file.rpartition("@")
        pipeline = add_embeddings(pipeline, path, word, config.allow_pickle)
    return pipeline.with_clip_skip(config.clip_skip)


def _file_and_scale(file: str) -> tuple[str, float]:
    """FILE or FILE@SCALE."""
    path, _, scale = file.rpartition("@")
    if not path or paths.at(file).is_file():
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


def network(config: ConfigDict, null_cond: PyTree = MappingProxyType({})) -> UNet | Transformer:
    """The untrained network of config.model. Its `kind` is one of NETWORKS, by default a U-Net.

    null_cond: of its condition. A network whose cross_attention_dim is None reads texts as wide as these.
    """
    values = {"time_smoothing": _time_smoothing(config)} | _fields(config.model)
    kind = choose(NETWORKS, values.pop("kind", "unet"), "model.kind")
    if "text" in null_cond and values.get("cross_attention_dim") is None:
        values["cross_attention_dim"] = null_cond["text"].shape[-1]
    return kind(**values)


def _time_smoothing(config: ConfigDict) -> float:
    """A twentieth of the way from data to noise in the network's unit of time, where its time is slowest.

    To two digits: 50 of 1000 steps, and next to nothing where the time is sigma or its logarithm, which have no fast
    waves.
    """
    base, parts = schedule(config), np.linspace(0, 1, 101)[1:]
    with np.errstate(divide="ignore"):  # of the noise by the data, at pure noise
        x = parallel.whole(np.zeros((100, 1), np.float32))  # compiles nothing, unlike jnp.zeros
        _, t = _parameterization(config).inputs(x, base(base.at(parts)))
    return float(f"{0.05 * 100 * float(np.abs(np.diff(t)).min()):.2g}")


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
        folder = config.autoencoder.checkpoint
        module = autoencoder_of(*read_config(shipped.find(folder)))[0] if folder else autoencoder(config)
        return codecs.autoencoder_kl(module, shapes_of(module), config.sample.tile)

    return choose({"identity": codecs.identity, "kl": untrained}, config.autoencoder.kind, "autoencoder kind")()


def conditioning(config: ConfigDict, texts: Path | None = None) -> Conditioning:
    """The condition of the denoiser, from config.condition.

    texts: a local folder that keeps the conditions of prompts. Text encoders are read only for prompts that it lacks.
    """
    kinds = {
        "none": conditionings.unconditional,
        "class": lambda: conditionings.class_labels(config.condition.num_classes),
        "text": lambda: _text(config.condition, texts),
    }
    return choose(kinds, config.condition.kind, "condition kind")()


def _text(section: ConfigDict, texts: Path | None) -> Conditioning:
    section = fields.section(fields.CONDITION, **section)
    on_tokens = choose({"channels": False, "tokens": True}, section.join, "condition.join")
    null_is_zeros = choose({"prompt": False, "zeros": True}, section.null, "condition.null")
    key = functools.partial(encoders.cache_key, section)

    def keep(of_prompts: OfPrompts) -> OfPrompts:
        has_folders = any(entry.is_folder for entry in encoders.entries(section))
        return kept(of_prompts, texts, key()) if texts is not None and has_folders else of_prompts

    return conditionings.text(
        lambda: encoders.text_encoders(section),
        key,
        on_tokens,
        null_is_zeros,
        keep,
        lambda: encoders.tokenizers(section),
    )


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
    base = choose(SCHEDULES, section.name, "schedule")(section)
    if not section.zero_terminal_snr:
        return base
    if config.objective.prediction == "eps":
        raise ValueError(
            "schedule.zero_terminal_snr starts from pure noise, where eps does not determine the image: set "
            "objective.prediction to v or x0"
        )
    return schedules.zero_terminal_snr(base)
