"""The two stages of a latent diffusion model, from config to trained weights. In pixel space there is only the
second.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, pictures
from diffusion_jax.app.agreement import check_records
from diffusion_jax.build import Model
from diffusion_jax.data.cache import cached
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Transform, to_float, to_uint8
from diffusion_jax.interop import load_autoencoder, save_autoencoder
from diffusion_jax.models import lora
from diffusion_jax.models.autoencoder import AutoencoderKL, mode
from diffusion_jax.models.denoiser import Denoiser
from diffusion_jax.objectives.denoising import denoising
from diffusion_jax.pipelines import codec as codecs
from diffusion_jax.pipelines.codec import Codec, check_size
from diffusion_jax.pipelines.conditioning import Conditioning
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.loop import Task, check_batch_size, fit

ENCODE_BATCH = 64  # images that the autoencoder encodes at once
SHOWN = 8  # held-out images that the first stage is watched on
SCALE_IMAGES = 1024  # images that the latents' standard deviation is estimated from


def first_stage(config: ConfigDict, workdir: Path) -> Codec:
    """The codec of config.autoencoder: pixels as they are, a checkpoint's folder, or what the work directory holds."""
    section = config.autoencoder

    def trained() -> Codec:
        return codecs.autoencoder_kl(
            *load_autoencoder(section.checkpoint or first_stage_folder(workdir)), config.sample.tile
        )

    return build.choose({"identity": codecs.identity, "kl": trained}, section.kind, "autoencoder kind")()


def first_stage_folder(workdir: Path) -> Path:
    """Where a run keeps its first stage."""
    return workdir / "autoencoder"


def needs_first_stage(config: ConfigDict, workdir: Path) -> bool:
    """Whether a first stage is still to be trained in the work directory."""
    section = config.autoencoder
    trained = (first_stage_folder(workdir) / "config.json").exists()
    return section.kind == "kl" and not section.checkpoint and not trained


def check_first_stage(config: ConfigDict) -> None:
    """Raise ValueError for what is wrong with the first stage, before anything is written."""
    section, model = config.autoencoder, build.autoencoder(config)
    check_size((config.data.size,) * 2, 2 ** (len(model.block_out_channels) - 1))
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, config.data.size, config.data.size, 3)))
    build.optimizer(section.optimizer, section.train.steps)
    check_batch_size(section.train.batch_size, section.train.accumulate)
    check_records(section.train, build.source(config, "first_stage"))


def check_resumed(workdir: Path, model: Model) -> None:
    """Raise ValueError for a work directory whose checkpoint is that of another model."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    if checkpoints.latest_step() is not None:
        checkpoints.check(jax.eval_shape(lambda: trainable(model, 0)))


def train_autoencoder(config: ConfigDict, folder: Path) -> None:
    """The first stage. In the end `folder` holds its averaged weights in the form that `load_autoencoder` reads, with
    the scale of its latents, and validation.json with its PSNR on held-out images."""
    section = config.autoencoder
    model = build.autoencoder(config)
    source = build.source(config, "first_stage")
    transform, augment = _images_only(build.transform(config)), _images_only(build.transform(config, section.flip))
    loss, params, frozen = build.autoencoder_loss(config, model, config.seed)
    held_out = build.source(config, "validation")
    shown = next(_some_images(held_out, transform, SHOWN))[:SHOWN]
    logging.info("autoencoder: %.2fM parameters, %d images", _millions(params["autoencoder"]), len(source))
    task = Task(
        name="autoencoder",
        loss=loss,
        params=params,
        frozen=frozen,
        batches=build.batches(source, section.train, config.seed, augment),
        optimizer=build.optimizer(section.optimizer, section.train.steps),
        snapshot=lambda params: reconstructions(model, params["autoencoder"], shown),
    )
    variables = fit(task, folder, section.train, config.seed)["autoencoder"]
    if jax.process_index() == 0:
        scale = 1 / _latent_std(model, variables, build.source(config, "train"), transform)
        report = _reconstruction(model, variables, held_out, transform)
        logging.info("autoencoder: PSNR %.2f dB on %d held-out images", report["psnr"], report["images"])
        (folder / "validation.json").write_text(json.dumps(report) + "\n")
        save_autoencoder(model.clone(scaling_factor=scale), variables, folder)


def reconstruct_held_out(config: ConfigDict, folder: Path) -> np.ndarray:
    """A sheet of held-out images and their reconstructions by the first stage in `folder`."""
    transform = _images_only(build.transform(config))
    images = next(_some_images(build.source(config, "validation"), transform, SHOWN))[:SHOWN]
    return reconstructions(*load_autoencoder(folder), images)


def reconstructions(model: AutoencoderKL, variables: PyTree, images: np.ndarray) -> np.ndarray:
    """A sheet of uint8 images (B, H, W, 3), each above what comes back from the mean of its latent."""
    back = to_uint8(jax.jit(model.apply)(variables, to_float(images)))
    return pictures.grid([*images, *np.asarray(back)], columns=len(images))


def train_denoiser(config: ConfigDict, workdir: Path, source: Source, model: Model, codec: Codec, snapshot) -> None:
    """The second stage. snapshot: averaged weights -> picture, drawn now and then."""
    params = trainable(model, config.seed)
    records, transform = _training_records(config, workdir, source, model.conditioning, codec)
    logging.info("U-Net: %.2fM parameters, %d training records", _millions(params), len(records))
    task = Task(
        name="denoiser",
        loss=denoiser_loss(config, model, codec),
        params=params,
        frozen={
            "codec": codec.stats,
            "null_cond": model.conditioning.null,
            "base": {} if model.lora is None else model.params,
        },
        batches=build.batches(records, config.train, config.seed, transform),
        optimizer=build.optimizer(config.optimizer, config.train.steps),
        snapshot=snapshot,
    )
    fit(task, workdir, config.train, config.seed)


def denoiser_loss(config: ConfigDict, model: Model, codec: Codec) -> Callable:
    """The loss of config.objective for the second stage."""
    weight, drop = build.weight(config), config.objective.drop
    of_unet = denoising(Denoiser(model.unet), codec.draw, model.schedule, model.prediction, weight, drop)

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys) -> tuple:
        return of_unet(variables(model, params, frozen["base"]), frozen, batch, keys)

    return loss


def trainable(model: Model, seed: int) -> PyTree:
    """What training begins with: a LoRA that changes nothing, the checkpoint's variables, or fresh ones."""
    key = jax.random.key(seed)
    if model.lora is not None:
        return lora.init(model.params, model.lora.rank, key, model.lora.targets)
    if model.params is not None:
        return model.params
    return jax.jit(model.unet.init)(key, *model.unet.example_inputs())


def variables(model: Model, trained: PyTree, base: PyTree) -> PyTree:
    """The U-Net's variables. trained: as `trainable`. base: those that a LoRA is added to."""
    return trained if model.lora is None else lora.added(base, trained, model.lora.scale)


def _training_records(
    config: ConfigDict, workdir: Path, source: Source, conditioning: Conditioning, codec: Codec
) -> tuple[Source, Transform | None]:
    """Records {"latent", "cond"} and what is left to do to them. What frozen networks say of a record is computed
    once.
    """
    transform = build.transform(config)
    names = {"codec": codec.name(), "conditioning": conditioning.name()}
    if any(names.values()):
        fields = {"latent": lambda batch: codec.encode(batch["image"]), "cond": conditioning.of_records}
        key = {"data": config.data.to_dict(), **names}
        return cached(source, workdir / "cache", key, fields, ENCODE_BATCH, transform), None

    def to_training(record: dict, rng: np.random.Generator) -> dict:
        record = transform(record, rng)
        return {"latent": record["image"], "cond": conditioning.of_records(record)}

    return source, to_training


def _images_only(transform: Transform) -> Transform:
    return lambda record, rng: {"image": transform(record, rng)["image"]}


def _latent_std(model: AutoencoderKL, variables: PyTree, source: Source, transform: Transform) -> float:
    """Standard deviation of the latents' means (Rombach et al. 2022, appendix D.1, scale its inverse)."""
    encode = jax.jit(lambda images: mode(model.apply(variables, to_float(images), method="encode")))
    latents = [encode(images) for images in _some_images(source, transform, SCALE_IMAGES)]
    return float(np.std(np.concatenate(latents)))


def _reconstruction(model: AutoencoderKL, variables: PyTree, source: Source, transform: Transform) -> dict:
    """PSNR in dB, the mean over images, of what comes back from the mean of the latent, clipped to the pixels'
    range.
    """

    @jax.jit
    def psnr(images):
        images = to_float(images)
        error = jnp.clip(model.apply(variables, images), -1, 1) - images
        return 10 * jnp.log10(4 / jnp.mean(jnp.square(error), axis=(1, 2, 3)))

    values = np.concatenate([psnr(images) for images in _some_images(source, transform, len(source))])
    return {"images": len(values), "psnr": float(np.mean(values))}


def _some_images(source: Source, transform: Transform, count: int):
    """Batches of uint8 images in the source's order, `count` in all or as many as there are."""
    size = max(n for n in range(1, ENCODE_BATCH + 1) if len(source) % n == 0)  # leaves no remainder
    for i, batch in enumerate(loader(source, size, seed=0, transform=transform, shuffle=False, repeat=False)):
        if i * size >= count:
            return
        yield batch["image"]


def _millions(params: PyTree) -> float:
    return sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
