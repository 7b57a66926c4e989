"""The modes of the command line: each takes (config, workdir)."""

import json
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, drawing, pictures, stages
from diffusion_jax.app.agreement import check_condition, check_records
from diffusion_jax.build import Model
from diffusion_jax.data.transforms import crop
from diffusion_jax.evaluation.likelihood import check_section, evaluate_likelihood
from diffusion_jax.interop import load_autoencoder, load_unet, save_autoencoder, save_pipeline, save_unet
from diffusion_jax.interop.lora import save_lora
from diffusion_jax.interop.tensors import read_json
from diffusion_jax.pipelines import Pipeline
from diffusion_jax.pipelines import codec as codecs
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.loop import check_batch_size


def train(config: ConfigDict, workdir: Path) -> None:
    """Train the first stage if the work directory has none, then the denoiser. A stopped run goes on where it was."""
    if not build.has_denoiser(config):
        stages.check_first_stage(config)
        _note_config(config, workdir)
        stages.train_autoencoder(config, workdir)
        return
    # what is wrong in the config is found before hours of training rather than after
    build.weight(config)
    build.optimizer(config.optimizer, config.train.steps)
    check_batch_size(config.train.batch_size, config.train.accumulate)
    model = build.model(config, training=True)
    config.data.size = model.size[0]
    source = build.source(config, "train")
    check_condition(config, source)
    check_records(config.train, source)
    stages.check_resumed(workdir, model)
    asked = drawing.request(config, model)
    if model.codec is None and stages.needs_first_stage(config, workdir):
        stages.check_first_stage(config)
        _note_config(config, workdir)
        stages.train_autoencoder(config, stages.first_stage_folder(workdir))
    codec = model.codec or stages.first_stage(config, workdir)
    _note_config(config, workdir)

    def snapshot(params: PyTree) -> np.ndarray:
        pipeline = build.pipeline(model, stages.variables(model, params, model.params), codec)
        return drawing.sheet(config, list(drawing.draw(asked, pipeline, config.sample.batch_size)))

    stages.train_denoiser(config, workdir, source, model, codec, snapshot)


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
    if not build.has_denoiser(config):
        sheet = stages.reconstruct_held_out(config, workdir)
        (workdir / "samples").mkdir(exist_ok=True)
        pictures.save(workdir / "samples" / "grid.png", sheet, {"weights": str(workdir)})
        logging.info("wrote %s", workdir / "samples" / "grid.png")
        return
    model = build.model(config)
    asked = drawing.request(config, model)
    pipeline, origin = _load_pipeline(config, workdir, model)
    logging.info("weights: %s", origin)
    folder, drawn = workdir / "samples", []
    for one in drawing.draw(asked, pipeline, config.sample.batch_size, progress=True):
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
    if not build.has_denoiser(config):
        raise ValueError("--mode=eval measures a denoiser, and this config trains a first stage alone")
    model = build.model(config)
    config.data.size = model.size[0]
    check_section(config.eval, model.schedule)
    pipeline, origin = _load_pipeline(config, workdir, model)
    logging.info("weights: %s", origin)
    source, transform = build.source(config, "validation"), crop(*model.size, upscale=config.data.upscale)
    check_condition(config, source)
    report = evaluate_likelihood(pipeline, model.schedule, source, transform, model.conditioning, config.eval)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "eval.json").write_text(json.dumps({"weights": origin} | report, indent=2) + "\n")
    logging.info(
        "flow %.4f, bound %.4f %s of the %s of %d images of %s; wrote %s",
        *(report["flow"]["mean"], report["bound"]["mean"], report["unit"], report["of"], report["images"]),
        *(report["data"], workdir / "eval.json"),
    )


def export(config: ConfigDict, workdir: Path) -> None:
    """Write the averaged weights to workdir/export, as safetensors that diffusers reads too: the folders unet and vae,
    of a model from a checkpoint the whole pipeline, of a LoRA one file. Stored in float16, a pipeline in config.dtype,
    as the peer opens half precision only when told so, a LoRA in float32.
    """
    model, folder = build.model(config), workdir / "export"
    checkpoints = Checkpoints(workdir / "checkpoints")
    params = _trained(config, workdir, model, checkpoints)
    if model.lora is not None:
        folder.mkdir(parents=True, exist_ok=True)
        save_lora(folder / "lora.safetensors", params, model.lora.scale)
    elif model.published is not None:
        unet = model.published.unet._replace(params=params)
        save_pipeline(model.published._replace(unet=unet), folder, build.DTYPES[config.dtype])
    else:
        save_unet(model.unet, params, folder / "unet", np.float16)
        if config.autoencoder.kind == "kl":
            first_stage = load_autoencoder(config.autoencoder.checkpoint or stages.first_stage_folder(workdir))
            save_autoencoder(*first_stage, folder / "vae", np.float16)
    logging.info("wrote step %d of %s to %s", checkpoints.latest_step(), workdir, folder)


def _clear(folder: Path) -> None:
    """Make the folder of samples, without pictures of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*.png"):
        old.unlink()


def _load_pipeline(config: ConfigDict, workdir: Path, model: Model) -> tuple[Pipeline, str]:
    """The work directory's own newest checkpoint if it has one, else the weights that come with the config."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    step = checkpoints.latest_step()
    if step is not None:
        codec = model.codec or stages.first_stage(config, workdir)
        origin = f"{checkpoints.folder}, step {step}, averaged"
        params = stages.variables(model, _trained(config, workdir, model, checkpoints), model.params)
        return build.pipeline(model, params, codec), origin
    if model.params is not None:
        return build.pipeline(model, model.params, model.codec), config.checkpoint
    if config.weights and Path(config.weights).exists():
        codec = codecs.identity()
        if config.autoencoder.kind == "kl":
            codec = codecs.autoencoder_kl(*load_autoencoder(Path(config.weights) / "vae"), config.sample.tile)
        unet, params = load_unet(Path(config.weights) / "unet")
        return build.pipeline(model._replace(unet=unet), params, codec), config.weights
    raise FileNotFoundError(f"no checkpoint in {checkpoints.folder}: run --mode=train first, or name its --workdir")


def _trained(config: ConfigDict, workdir: Path, model: Model, checkpoints: Checkpoints) -> PyTree:
    """The averaged weights of the newest checkpoint. Raises ValueError for LoRAs that they know nothing of."""
    if model.published is not None and model.lora is None:
        known = read_json(workdir / "config.json")["loras"]
        if list(config.loras) != known:
            raise ValueError(
                f"config.loras: the weights in {workdir} were trained with {', '.join(known) or 'none'}; for others "
                "run --mode=export and name its folder as --config.checkpoint, with another --workdir"
            )
    return checkpoints.restore_ema(jax.eval_shape(lambda: stages.trainable(model, 0)))
