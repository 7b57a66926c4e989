"""The modes of the command line: each takes (config, workdir)."""

import json
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, drawing, pictures, stages
from diffusion_jax.data.transforms import square
from diffusion_jax.evaluation.likelihood import check_section, evaluate_likelihood
from diffusion_jax.interop import load_autoencoder, load_unet, save_autoencoder, save_unet
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines import Pipeline
from diffusion_jax.pipelines import codec as codecs
from diffusion_jax.pipelines.codec import Codec
from diffusion_jax.pipelines.conditioning import Conditioning
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.loop import check_batch_size


def train(config: ConfigDict, workdir: Path) -> None:
    """Train the first stage if the work directory has none, then the denoiser. A stopped run goes on where it was."""
    if "model" not in config:
        _note_config(config, workdir)
        stages.train_autoencoder(config, workdir)
        return
    # what is wrong in the config is found before hours of training rather than after
    build.conversion(config)
    build.weight(config)
    build.optimizer(config.optimizer, config.train.steps)
    check_batch_size(config.train.batch_size, config.train.accumulate)
    source = build.source(config, "train")
    conditioning = build.conditioning(config)
    asked = drawing.request(config, conditioning)
    if stages.needs_first_stage(config, workdir):
        _note_config(config, workdir)
        stages.train_autoencoder(config, stages.first_stage_folder(workdir))
    codec = stages.first_stage(config, workdir)
    _note_config(config, workdir)
    apply = build.network_apply(build.unet(config))

    def snapshot(params: PyTree) -> np.ndarray:
        pipeline = _pipeline(config, apply, params, conditioning, codec)
        return drawing.sheet(config, list(drawing.draw(asked, pipeline, conditioning, config.sample.batch_size)))

    stages.train_denoiser(config, workdir, source, conditioning, codec, snapshot)


def _note_config(config: ConfigDict, workdir: Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")


def sample(config: ConfigDict, workdir: Path) -> None:
    """Draw config.sample.num_images for each of config.sample.prompts into workdir/samples.

    With config.sample.image they are that picture drawn anew, with config.sample.mask a part of it. A config without a
    denoiser draws held-out images, each above its reconstruction.
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
    asked = drawing.request(config, conditioning)
    pipeline, origin = _load_pipeline(config, workdir, conditioning)
    logging.info("weights: %s", origin)
    folder, drawn = workdir / "samples", []
    for one in drawing.draw(asked, pipeline, conditioning, config.sample.batch_size, progress=True):
        if not drawn:
            _clear(folder)
        texts = drawing.texts(config, one.prompt, one.seed, origin)
        pictures.save(folder / f"{len(drawn):04d}.png", one.image, texts)
        drawn.append(one)
    grid = folder / "grid.png"
    texts = drawing.texts(config, "; ".join(config.sample.prompts), config.sample.seed, origin)
    pictures.save(grid, drawing.sheet(config, drawn), texts)
    logging.info("wrote %d images and %s", len(drawn), grid)


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Measure how likely held-out data is, as config.eval says; every figure goes to workdir/eval.json."""
    if jax.process_count() > 1:
        raise ValueError("evaluation runs on one host: leave out --distributed")
    if "model" not in config:
        raise ValueError("--mode=eval measures a denoiser, and this config trains a first stage alone")
    schedule = build.schedule(config)
    check_section(config.eval, schedule)
    conditioning = build.conditioning(config)
    pipeline, origin = _load_pipeline(config, workdir, conditioning)
    logging.info("weights: %s", origin)
    source, transform = build.source(config, "validation"), square(config.data.size, upscale=config.data.upscale)
    report = evaluate_likelihood(pipeline, schedule, source, transform, conditioning, config.eval)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "eval.json").write_text(json.dumps({"weights": origin} | report, indent=2) + "\n")
    logging.info(
        "flow %.4f, bound %.4f %s of the %s of %d images of %s; wrote %s",
        *(report["flow"]["mean"], report["bound"]["mean"], report["unit"], report["of"], report["images"]),
        *(report["data"], workdir / "eval.json"),
    )


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


def _clear(folder: Path) -> None:
    """Make the folder of samples, without pictures of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()


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
