"""Whole text-to-image models as they are published: a folder of diffusers, or one file of the original code.

A folder has model_index.json and a subfolder for each part:

    unet/ vae/ text_encoder/ text_encoder_2/      networks, each a config.json and its tensors
    tokenizer/ tokenizer_2/                       vocabularies
    scheduler/                                    scheduler_config.json: the noise schedule and what the U-Net predicts
    safety_checker/                               of Stable Diffusion 1: which images must not be shown
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree
from tokenizers import Tokenizer

from diffusion_jax.core import schedules
from diffusion_jax.core.schedules import DiscreteSchedule
from diffusion_jax.interop import encoders
from diffusion_jax.interop.encoders import canonical, save_text_encoder, text_encoder_of
from diffusion_jax.interop.folders import WEIGHTS, autoencoder_of, read_config, save_autoencoder, save_unet, unet_of
from diffusion_jax.interop.names import from_torch, modern
from diffusion_jax.interop.safety import SafetyChecker, load_safety_checker
from diffusion_jax.interop.single_file import Description, read_single_file
from diffusion_jax.interop.tensors import read_json, read_tensors, write_json
from diffusion_jax.interop.tokenizers import load_tokenizer
from diffusion_jax.messages import first_line
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.text.t5 import T5Encoder
from diffusion_jax.models.unet import UNet

TEXT = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
NETWORKS = {"unet": unet_of, "vae": autoencoder_of} | dict.fromkeys(TEXT, text_encoder_of)
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}  # names in diffusers and here
STABLE_DIFFUSION = {  # how all of them were trained
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}


class Part(NamedTuple):
    """A network and its variables: `part.module.apply(part.params, …)`."""

    module: UNet | AutoencoderKL | ClipTextEncoder | T5Encoder
    params: PyTree


class Network(NamedTuple):
    """A network of a pipeline before loading: the shapes of its variables, and the tensors to load."""

    module: UNet | AutoencoderKL | ClipTextEncoder | T5Encoder
    like: PyTree
    tensors: dict[str, np.ndarray]
    source: str


class PublishedPipeline(NamedTuple):
    """A text-to-image model of the Stable Diffusion family.

    unet, autoencoder: the denoiser of latents, and the network from images to latents and back.
    text_encoders, tokenizers: one each (SD 1 and 2, the refiner of SDXL) or two (SDXL); of a single file no tokenizers.
    schedule, prediction: of the denoiser; "eps", "v" or "x0".
    scheduler: scheduler_config.json, where timestep_spacing, steps_offset and the like say how its authors sample.
    index: model_index.json without the parts, such as force_zeros_for_empty_prompt.
    safety_checker: None if it has none, or is not to be used. `save_pipeline` does not write it.
    """

    unet: Part
    autoencoder: Part
    text_encoders: tuple[Part, ...]
    tokenizers: tuple[Tokenizer, ...]
    schedule: DiscreteSchedule
    prediction: str
    scheduler: Mapping = MappingProxyType({})
    index: Mapping = MappingProxyType({})
    safety_checker: SafetyChecker | None = None

    @property
    def text_names(self) -> tuple[str, ...]:
        """The folders of the text encoders; the refiner of SDXL has only the second."""
        refiner = len(self.text_encoders) == 1 and self.unet.module.addition_embed_type is not None
        return TEXT[1:] if refiner else TEXT[: len(self.text_encoders)]


def load_pipeline(
    path: str | Path,
    dtype: DTypeLike = jnp.float32,
    prediction: str | None = None,
    tokenizers: str | Path | None = None,
    allow_pickle: bool = False,
    safety_checker: bool = True,
) -> PublishedPipeline:
    """A pipeline from a diffusers folder or from a .safetensors file in the original layout.

    dtype: of all variables.
    prediction: override it with "eps", "v" or "x0". Needed for a single file of SD 2: 512-base is "eps", 768 is "v".
    tokenizers: the folder of a pipeline with the tokenizers for a single file.
    allow_pickle: see `read_file`.
    safety_checker: load that of a folder whose model_index.json names one.
    Raises FileNotFoundError for missing files and ValueError for unsupported or malformed ones, naming the file.
    """
    path = Path(path)
    if prediction not in (None, *PREDICTIONS.values()):
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS.values())}, got {prediction!r}")
    scheduler, index = _settings(path)
    schedule, predicted = schedule_of(scheduler, path / "scheduler" / "scheduler_config.json")
    networks = read_networks(path, allow_pickle)
    unet = networks["unet"].module
    if path.is_file() and prediction is None and unet.use_linear_projection and unet.addition_embed_type is None:
        raise ValueError(f"{path}: SD 2 in one file does not say what it predicts; give 'eps' (512-base) or 'v' (768)")
    folders = [Path(tokenizers or path) / kind for kind, name in zip(TOKENIZERS, TEXT, strict=True) if name in networks]
    read = tuple(load_tokenizer(folder) for folder in folders if tokenizers or folder.is_dir())
    parts = {
        name: Part(network.module, from_torch(network.tensors, network.source, network.like, dtype))
        for name, network in networks.items()
    }
    return PublishedPipeline(
        unet=parts["unet"],
        autoencoder=parts["vae"],
        text_encoders=tuple(parts[name] for name in TEXT if name in parts),
        tokenizers=read,
        schedule=schedule,
        prediction=prediction or predicted,
        scheduler=scheduler,
        index=index,
        safety_checker=_safety_checker(path, allow_pickle) if safety_checker else None,
    )


def _safety_checker(path: Path, allow_pickle: bool) -> SafetyChecker | None:
    if path.is_file() or not _is_used(read_json(path / "model_index.json").get("safety_checker")):
        return None
    try:
        return load_safety_checker(path / "safety_checker", allow_pickle)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; without it, set safety_checker=False") from None


def save_pipeline(pipeline: PublishedPipeline, folder: str | Path, dtype: DTypeLike = jnp.float32) -> None:
    """Write a folder that `load_pipeline` and diffusers read. dtype: of the stored tensors."""
    folder = Path(folder)
    unet = pipeline.unet.module
    save_unet(*pipeline.unet, folder / "unet", dtype)
    save_autoencoder(*pipeline.autoencoder, folder / "vae", dtype)
    wide = unet.addition_embed_type is not None
    kind = f"StableDiffusion{'XL' * wide}{'Inpaint' * (unet.in_channels == 9)}Pipeline"
    index = {"_class_name": kind, **pipeline.index}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if not wide:
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    for name, part in zip(pipeline.text_names, pipeline.text_encoders, strict=True):
        save_text_encoder(*part, folder / name, dtype)
        index[name] = ["transformers", read_config(folder / name)[0]["architectures"][0]]
    for name, tokenizer in zip(pipeline.text_names, pipeline.tokenizers, strict=bool(pipeline.tokenizers)):
        kind = name.replace("text_encoder", "tokenizer")
        _save_tokenizer(tokenizer, folder / kind)
        index[kind] = ["transformers", "CLIPTokenizer"]
    scheduler = scheduler_config(pipeline.scheduler, pipeline.schedule, pipeline.prediction)
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", index)


def read_networks(path: str | Path, allow_pickle: bool = False) -> dict[str, Network]:
    """The networks of a folder or file: "unet", "vae", "text_encoder" and "text_encoder_2" as far as it has them."""
    path = Path(path)
    if path.is_file():
        parts = read_single_file(path, allow_pickle)
        sources = dict.fromkeys(parts, str(path))
    else:
        index = read_json(path / "model_index.json")
        for name in ("unet", "vae"):
            if name not in index:
                raise ValueError(f"{path / 'model_index.json'}: expected a pipeline with unet and vae, got no {name}")
        parts, sources = {}, {}
        for name in NETWORKS:
            if _is_used(index.get(name)):
                stem = encoders.WEIGHTS if name in TEXT else WEIGHTS
                tensors, sources[name] = read_tensors(path / name, stem, allow_pickle)
                parts[name] = Description(read_config(path / name)[0], tensors)
    networks = {}
    for name, (config, tensors) in parts.items():
        module, like = NETWORKS[name](config, sources[name])
        tensors = canonical(tensors, module) if name in TEXT else modern(tensors)
        networks[name] = Network(module, like, tensors, sources[name])
    return networks


def schedule_of(config: Mapping, source: str | Path) -> tuple[DiscreteSchedule, str]:
    """The noise schedule and the prediction ("eps", "v" or "x0") of the content of a scheduler_config.json.

    source: the file, for the messages. Raises ValueError for a schedule without betas or of an unknown kind.
    """
    kind, steps = config.get("beta_schedule"), config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    try:
        if config.get("trained_betas") is not None:
            schedule = schedules.from_betas(config["trained_betas"])
        else:
            schedule = {
                "linear": lambda: schedules.from_betas(np.linspace(start, end, steps)),
                "scaled_linear": lambda: schedules.from_betas(np.linspace(start**0.5, end**0.5, steps) ** 2),
                "squaredcos_cap_v2": lambda: schedules.cosine(steps),
            }[kind]()
        if config.get("rescale_betas_zero_snr"):
            schedule = schedules.zero_terminal_snr(schedule)
        return schedule, PREDICTIONS[config.get("prediction_type", "epsilon")]
    except KeyError as error:
        raise ValueError(f"{source}: no noise schedule with betas and a known prediction: {error} is unknown") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: no noise schedule can be made from it: {first_line(error)}") from None


def scheduler_config(config: Mapping, schedule: DiscreteSchedule, prediction: str) -> dict:
    """`config`, the content of a scheduler_config.json, with a table of betas where it means another schedule."""
    config = dict(config or {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False})
    config["prediction_type"] = {ours: theirs for theirs, ours in PREDICTIONS.items()}[prediction]
    known = {"beta_schedule", "trained_betas"} & config.keys()
    if known and np.array_equal(schedule_of(config, "scheduler")[0].logsnr_table, schedule.logsnr_table):
        return config
    alphas_bar = schedule.alphas_bar
    betas = 1 - alphas_bar / np.concatenate([[1.0], alphas_bar[:-1]])
    return config | {
        "num_train_timesteps": schedule.num_steps,
        "trained_betas": np.minimum(betas, 1 - 1e-12).tolist(),
        "rescale_betas_zero_snr": bool(np.isneginf(schedule.logsnr_table[-1])),
    }


def _settings(path):
    """(scheduler_config.json, model_index.json without its parts); what is known of a single file."""
    if path.is_file():
        return STABLE_DIFFUSION, {}
    index = read_json(path / "model_index.json")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    return scheduler, {name: value for name, value in index.items() if not isinstance(value, list)}


def _is_used(entry):
    """Whether model_index.json's entry of a part, [library, class], names anything."""
    return isinstance(entry, list) and entry[:1] not in ([], [None])


def _save_tokenizer(tokenizer, folder):
    """tokenizer.json, and vocab.json with merges.txt for readers that know nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    bos, eos, *_ = tokenizer.encode("").tokens
    roles = {"bos_token": bos, "eos_token": eos, "unk_token": tokenizer.model.unk_token}
    roles["pad_token"] = tokenizer.padding["pad_token"]
    length = tokenizer.truncation["max_length"]
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **roles}
    write_json(folder / "tokenizer_config.json", settings)
