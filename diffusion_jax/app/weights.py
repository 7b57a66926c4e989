"""The weights of a model: those of a run, or those that come with its config."""

import json
from pathlib import Path

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import codec as codecs
from diffusion_jax.app import build, fields, first_stage, shipped
from diffusion_jax.interop import load_autoencoder, load_unet
from diffusion_jax.interop.tensors import read_json
from diffusion_jax.model import DiffusionModel, network_of
from diffusion_jax.training.checkpoints import Checkpoints


def load_model(folder: str | Path, size: tuple[int, int] = (0, 0)) -> DiffusionModel:
    """The model in a folder, with its weights: the work directory of a training, what --mode=export wrote of it, or the
    demo, "weights/latent_cfg".

    folder: with a config.json, and checkpoints/ or unet/. The demo is found from any current folder.
    size: height and width of the images in pixels; 0 for one that is as in training.
    Raises FileNotFoundError for a folder without a config or without weights, and ValueError for one of another kind of
    model and for a size that the model cannot make.
    """
    folder = shipped.find(folder)
    config = fields.completed(ConfigDict(read_json(folder / "config.json")))
    if not build.has_denoiser(config):
        raise ValueError(
            f"{folder / 'config.json'} describes no denoiser; an autoencoder is loaded by load_autoencoder"
        )
    if "checkpoint" not in config:
        config.weights = str(folder) if (folder / "unet").exists() else ""
    return load(config, folder, build.model(config, size))[0]


def load(config: ConfigDict, workdir: Path, model: DiffusionModel) -> tuple[DiffusionModel, str]:
    """The model with weights, and where they are from: the newest checkpoint of the work directory if it has one, else
    what comes with the config.

    Raises FileNotFoundError where there are none, and ValueError for a checkpoint of another config.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    if step is not None:
        params = model.adapter.join(trained(config, workdir, model), model.params)
        codec = first_stage.codec(config, workdir, model.codec)
        return model._replace(params=params, codec=codec), f"{checkpoints.folder}, step {step}, averaged"
    if "checkpoint" in config:
        return model, config.checkpoint
    folder = shipped.find(config.weights)
    if config.weights and folder.exists():
        unet, params = load_unet(folder / "unet")
        codec = model.codec
        if (folder / "vae").exists():
            codec = codecs.autoencoder_kl(*load_autoencoder(folder / "vae"), config.sample.tile)
        return model._replace(network=network_of(unet), params=params, codec=codec), config.weights
    raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: run --mode=train first, or name its --workdir")


def trained(config: ConfigDict, workdir: Path, model: DiffusionModel) -> PyTree:
    """What the newest checkpoint trained, averaged. Raises ValueError for LoRAs that were not there in training."""
    if "loras" in config and "lora" not in config:
        known = json.loads((workdir / "config.json").read_text())["loras"]
        if list(config.loras) != known:
            raise ValueError(
                f"config.loras: the weights in {workdir} were trained with {', '.join(known) or 'none'}; for others "
                "run --mode=export and name its folder as --config.checkpoint, with another --workdir"
            )
    like, _ = jax.eval_shape(model.adapter.split, model.params, jax.random.key(0))
    return Checkpoints(workdir / "checkpoints").restore_ema(like)
