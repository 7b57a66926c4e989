"""The weights of a model: those of a run, or those that come with its config."""

import json
from pathlib import Path

import jax
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import codec as codecs
from diffusion_jax.app import first_stage
from diffusion_jax.interop import load_autoencoder, load_unet
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.models.applied import Applied
from diffusion_jax.training.checkpoints import Checkpoints


def load(config: ConfigDict, workdir: Path, model: DiffusionModel) -> tuple[DiffusionModel, str]:
    """The model with weights, and where they come from: the newest checkpoint of the work directory, else the weights
    that come with the config.

    Raises FileNotFoundError without weights, and ValueError for a checkpoint of another config.
    """
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    if step is not None:
        params = model.adapter.join(trained(config, workdir, model), model.params)
        codec = first_stage.codec(config, workdir, model.codec)
        return model._replace(params=params, codec=codec), f"{checkpoints.folder}, step {step}, averaged"
    if "checkpoint" in config:
        return model, config.checkpoint
    folder = Path(config.weights)
    if config.weights and folder.exists():
        unet, params = load_unet(folder / "unet")
        codec = model.codec
        if (folder / "vae").exists():
            codec = codecs.autoencoder_kl(*load_autoencoder(folder / "vae"), config.sample.tile)
        return model._replace(network=Network(Applied(unet)), params=params, codec=codec), config.weights
    raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: run --mode=train first, or give its --workdir")


def trained(config: ConfigDict, workdir: Path, model: DiffusionModel) -> PyTree:
    """The averaged weights of the newest checkpoint. Raises ValueError for LoRAs that it was not trained with."""
    if "loras" in config and "lora" not in config:
        known = json.loads((workdir / "config.json").read_text())["loras"]
        if list(config.loras) != known:
            raise ValueError(
                f"config.loras: the weights in {workdir} were trained with {', '.join(known) or 'none'}; for others "
                "run --mode=export and name its folder as --config.checkpoint, with another --workdir"
            )
    like, _ = jax.eval_shape(model.adapter.split, model.params, jax.random.key(0))
    return Checkpoints(workdir / "checkpoints").restore_ema(like)
