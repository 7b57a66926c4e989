"""--mode=export: write the weights in formats that other programs read."""

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import build
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.build import encoders, weights
from diffusion_jax.build.agreement import has_text_encoders
from diffusion_jax.interop import load_autoencoder, save_autoencoder, save_pipeline
from diffusion_jax.interop.denoisers import name_of, save_denoiser
from diffusion_jax.interop.lora import save_lora
from diffusion_jax.interop.pipeline import family_of
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.paths import Path
from diffusion_jax.training.checkpoints import Checkpoints


def run(config: ConfigDict, workdir: Path) -> None:
    """Write the averaged weights to workdir/export, as safetensors that diffusers reads too.

    The config's own model: folders unet (or transformer) and vae, in float16, and the run's config.json. Its text
    encoders stay where they are, or with config.condition.copy are copied beside these. A model from a checkpoint: a
    whole pipeline in config.dtype (diffusers reads half precision only if told to). A LoRA: one file, in float16 and
    beside config.json for the config's own model.
    """
    folder = workdir / "export"
    if not build.model.has_denoiser(config):
        raise ValueError(
            "--mode=export writes a denoiser, and this config trains a first stage alone: its work directory is a VAE "
            "folder of diffusers' format as it is"
        )
    step = Checkpoints(workdir / "checkpoints").latest_step()
    if step is None:
        raise FileNotFoundError(f"no checkpoint in {workdir / 'checkpoints'}: train first, or name another --workdir")
    make_writable(workdir)
    if "checkpoint" in config:
        _export_published(config, workdir, folder)
    else:
        _export_own(config, workdir, folder)
    logging.info("wrote step %d of %s to %s", step, workdir, folder)


def _export_own(config: ConfigDict, workdir: Path, folder: Path) -> None:
    config, model = weights.model_of_run(config, workdir)
    trained, module = weights.trained(config, workdir, model), model.network.apply.module
    if "lora" in config:
        folder.mkdir(parents=True, exist_ok=True)
        save_lora(folder / weights.LORA, trained, build.model.lora_scale(config), np.float16, name_of(module))
    else:
        save_denoiser(module, trained, folder / name_of(module), np.float16)
        if config.autoencoder.kind == "kl":
            decoder = load_autoencoder(config.autoencoder.checkpoint or weights.first_stage_folder(workdir))
            save_autoencoder(*decoder, folder / "vae", np.float16)
    saved = read_json(workdir / "config.json")
    if has_text_encoders(config):
        condition = config.condition
        copied = encoders.copied(condition, folder) if condition.get("copy") else condition.encoders
        saved["condition"]["encoders"] = copied
    write_json(folder / "config.json", saved)


def _export_published(config: ConfigDict, workdir: Path, folder: Path) -> None:
    model = build.model.diffusion_model(config)
    trained = weights.trained(config, workdir, model)
    if "lora" in config:
        folder.mkdir(parents=True, exist_ok=True)
        part = family_of(config.checkpoint, config.allow_pickle).denoiser
        save_lora(folder / weights.LORA, trained, build.model.lora_scale(config), part=part)
        return
    published = build.model.published(config)
    denoiser = published.denoiser._replace(params=trained)
    save_pipeline(published.with_denoiser(denoiser), folder, build.model.DTYPES[config.dtype], config.checkpoint)
