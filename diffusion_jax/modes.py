"""The modes of the command line: each takes (config, workdir)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, pictures, stages
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.interop import load_autoencoder, load_unet, save_autoencoder, save_unet
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines import Pipeline, text_to_image
from diffusion_jax.pipelines import codec as codecs
from diffusion_jax.pipelines.codec import Codec
from diffusion_jax.pipelines.conditioning import Conditioning
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.loop import check_batch_size


class Drawn(NamedTuple):
    """One sampled image, uint8 (H, W, 3), and what made it."""

    prompt: str
    seed: int
    image: np.ndarray


def train(config: ConfigDict, workdir: Path) -> None:
    """Train the first stage if the work directory has none, then the denoiser. A stopped run goes on where it was."""
    if "model" not in config:
        _note_config(config, workdir)
        stages.train_autoencoder(config, workdir)
        return
    # what is wrong in the config is found before hours of training rather than after
    build.plan(config)
    build.conversion(config)
    build.weight(config)
    build.optimizer(config.optimizer, config.train.steps)
    check_batch_size(config.train.batch_size, config.train.accumulate)
    source = build.source(config, "train")
    conditioning = build.conditioning(config)
    conditioning.of_prompts([prompt for prompt, _ in _jobs(config.sample)])
    if stages.needs_first_stage(config, workdir):
        _note_config(config, workdir)
        stages.train_autoencoder(config, stages.first_stage_folder(workdir))
    codec = stages.first_stage(config, workdir)
    _note_config(config, workdir)
    apply = build.network_apply(build.unet(config))

    def snapshot(params: PyTree) -> np.ndarray:
        return _sheet(config, list(_draw(config, _pipeline(config, apply, params, conditioning, codec), conditioning)))

    stages.train_denoiser(config, workdir, source, conditioning, codec, snapshot)


def _note_config(config: ConfigDict, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")


def sample(config: ConfigDict, workdir: Path) -> None:
    """Draw config.sample.num_images for each of config.sample.prompts into workdir/samples.

    A config without a denoiser draws held-out images, each above its reconstruction.
    """
    if jax.process_count() > 1:
        raise ValueError("sampling runs on one host: leave out --distributed")
    if "model" not in config:
        sheet = stages.reconstruct_held_out(config, workdir)
        (workdir / "samples").mkdir(exist_ok=True)
        pictures.save(workdir / "samples" / "grid.png", sheet, {"weights": str(workdir)})
        logging.info("wrote %s", workdir / "samples" / "grid.png")
        return
    conditioning = build.conditioning(config)
    pipeline, origin = _load_pipeline(config, workdir, conditioning)
    logging.info("weights: %s", origin)
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()
    drawn = []
    for i, one in enumerate(_draw(config, pipeline, conditioning, progress=True)):
        pictures.save(folder / f"{i:04d}.png", one.image, _texts(config, one.prompt, one.seed, origin))
        drawn.append(one)
    grid = folder / "grid.png"
    pictures.save(
        grid, _sheet(config, drawn), _texts(config, "; ".join(config.sample.prompts), config.sample.seed, origin)
    )
    logging.info("wrote %d images and %s", len(drawn), grid)


def export(config: ConfigDict, workdir: Path) -> None:
    """Write the averaged weights to workdir/export/unet and vae, as float16 safetensors that diffusers reads too."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    conditioning, codec = build.conditioning(config), stages.first_stage(config, workdir)
    model, params = _own_unet(config, checkpoints, conditioning, codec)
    save_unet(model, params, workdir / "export" / "unet", np.float16)
    if config.autoencoder.kind == "kl":
        first_stage = load_autoencoder(config.autoencoder.checkpoint or stages.first_stage_folder(workdir))
        save_autoencoder(*first_stage, workdir / "export" / "vae", np.float16)
    logging.info("wrote step %d of %s to %s", checkpoints.latest_step(), workdir, workdir / "export")


def _draw(
    config: ConfigDict, pipeline: Pipeline, conditioning: Conditioning, progress: bool = False
) -> Iterator[Drawn]:
    """Every prompt with every seed, in batches of one size, the last one filled up."""
    section, plan = config.sample, build.plan(config)
    jobs = _jobs(section)
    size = min(section.batch_size, len(jobs))
    size += -size % jax.local_device_count()
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        full = batch + batch[-1:] * (size - len(batch))
        cond = conditioning.of_prompts([prompt for prompt, _ in full])
        keys = jax.vmap(jax.random.key)(np.array([seed for _, seed in full], np.uint32))
        images = text_to_image(pipeline, cond, keys, plan, section.guidance)
        for (prompt, seed), image in zip(batch, np.asarray(to_uint8(images)), strict=False):
            yield Drawn(prompt, seed, image)


def _jobs(section: ConfigDict) -> list[tuple[str, int]]:
    """(prompt, seed) of every image to draw."""
    jobs = [(prompt, section.seed + k) for prompt in section.prompts for k in range(section.num_images)]
    if not jobs:
        raise ValueError("nothing to draw: sample.prompts is empty or sample.num_images is 0")
    return jobs


def _load_pipeline(config: ConfigDict, workdir: Path, conditioning: Conditioning) -> tuple[Pipeline, str]:
    """The work directory's own newest checkpoint if it has one, else the weights that come with the config."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    if step is not None:
        codec = stages.first_stage(config, workdir)
        model, params = _own_unet(config, checkpoints, conditioning, codec)
        origin = f"{checkpoints.folder}, step {step}, averaged"
    elif config.weights and Path(config.weights).exists():
        codec = codecs.identity()
        if config.autoencoder.kind == "kl":
            codec = codecs.autoencoder_kl(*load_autoencoder(Path(config.weights) / "vae"))
        model, params = load_unet(Path(config.weights) / "unet")
        origin = config.weights
    else:
        raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: run --mode=train first, or name its --workdir")
    return _pipeline(config, build.network_apply(model), params, conditioning, codec), origin


def _own_unet(
    config: ConfigDict, checkpoints: Checkpoints, conditioning: Conditioning, codec: Codec
) -> tuple[UNet, PyTree]:
    """The denoiser of config.model with the averaged weights of the newest checkpoint."""
    model = build.unet(config)
    like = jax.eval_shape(lambda: stages.init_unet(config, model, conditioning, codec))
    return model, checkpoints.restore_ema(like)


def _pipeline(config: ConfigDict, apply, params: PyTree, conditioning: Conditioning, codec: Codec) -> Pipeline:
    return Pipeline(apply, params, build.conversion(config), codec, conditioning.null, config.data.size)


def _sheet(config: ConfigDict, drawn: Sequence[Drawn]) -> np.ndarray:
    return pictures.grid([one.image for one in drawn], config.sample.num_images, [one.prompt for one in drawn])


def _texts(config: ConfigDict, prompt: str, seed: int, origin: str) -> dict[str, str]:
    section = config.sample
    return {
        "prompt": prompt,
        "seed": str(seed),
        "solver": section.solver,
        "steps": str(section.steps),
        "guidance": str(section.guidance),
        "weights": origin,
        "config": config.to_json_best_effort(),
    }
