"""The first stage of latent diffusion, an autoencoder: train, load and inspect it."""

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax import build, hosts, parallel, paths, pictures
from diffusion_jax.app.workdir import wait_for
from diffusion_jax.build.initial import initial
from diffusion_jax.build.records import check_records
from diffusion_jax.codec import check_size
from diffusion_jax.data.loader import Tally, one_epoch
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Record, Transform, to_float, to_uint8
from diffusion_jax.evaluation.reconstruction import evaluate_reconstruction
from diffusion_jax.interop import load_autoencoder, save_autoencoder
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.messages import as_json
from diffusion_jax.models.autoencoder import AutoencoderKL, fold, mode
from diffusion_jax.paths import Path
from diffusion_jax.training.loop import Task, check_division, check_resumed, fit
from diffusion_jax.training.tracing import Wanted

BATCH = 64  # images in one call of the autoencoder
SHOWN = 8  # held-out images in a snapshot of the first stage
NOT_NAMED = (
    "this config trains no first stage of its own: name the folder of a trained autoencoder as "
    "config.autoencoder.checkpoint"
)
SCALE_IMAGES = 1024  # images to estimate the standard deviation of the latents


def is_missing(config: ConfigDict, workdir: Path) -> bool:
    """Whether the work directory still needs a first stage to be trained."""
    if "checkpoint" in config or config.autoencoder.kind != "kl" or config.autoencoder.checkpoint:
        return False
    return not (build.weights.first_stage_folder(workdir) / "config.json").exists()


def is_trained_here(config: ConfigDict) -> bool:
    """Whether the config says how to train its first stage, or takes only one that is trained already."""
    return "train" in config.autoencoder


def task(config: ConfigDict, folder: Path) -> Task:
    """The training task of a first stage in `folder`. Writes nothing yet.

    Raises ValueError if the config cannot be trained.
    """
    section, size = config.autoencoder, config.data.size
    if section.kind != "kl" or section.checkpoint:
        raise ValueError("no first stage to train: config.autoencoder must have kind=kl and an empty checkpoint")
    if not is_trained_here(config):
        raise ValueError(NOT_NAMED)
    check_division(section.train)
    model = build.model.autoencoder(config)
    check_size((size, size), model.factor)
    source = build.data.source(config, "first_stage", size)
    check_records(section.train, source)
    with parallel.on_host():
        loss, params, frozen = build.objective.objective(section.loss, model, jax.random.key(config.seed))
        params["autoencoder"] = initial(section.init, load_autoencoder, params["autoencoder"])
    check_resumed(folder, params)
    augment = _images_only(build.data.transform(config, (size, size), section.flip))
    snapshot_images = _snapshot_images(config)
    logging.info("autoencoder: %.2fM parameters, %d images", millions(params["autoencoder"]), len(source))
    tally = Tally()
    return Task(
        name="autoencoder",
        loss=loss,
        params=params,
        frozen=frozen,
        batches=build.data.batches(source, section.train, config.seed, augment, tally),
        optimizer=build.objective.optimizer(section.optimizer, section.train.steps),
        snapshot=lambda params: reconstructions(model, params["autoencoder"], snapshot_images),
        learning_rate=build.objective.learning_rate(section.optimizer, section.train.steps),
        records=tally,
    )


def train(task: Task, config: ConfigDict, folder: Path, traces: Wanted | None = None) -> None:
    """Train the autoencoder of `task`. Writes to `folder` its averaged weights for `load_autoencoder`, with the scale
    of the latents, and validation.json with its PSNR on held-out images.
    """
    size, model = config.data.size, build.model.autoencoder(config)
    variables = fit(task, folder, config.autoencoder.train, config.seed, traces)["autoencoder"]
    # every host measures, so that none waits long for another; the first writes
    latents = _latents(model, variables, build.data.source(config, "train", size), _resize(config), config.seed)
    model, variables = normalized(model, variables, latents)
    report = evaluate_reconstruction(functools.partial(model.apply, variables), _held_out(config))
    if parallel.is_main():
        logging.info("autoencoder: PSNR %.2f dB on %d held-out images", report["psnr"]["mean"], report["images"])
        paths.write(folder / "validation.json", as_json(report) + "\n")
        save_autoencoder(model, variables, folder)
    hosts.meet("first stage")
    wait_for(folder / "config.json")


def reconstruct_held_out(config: ConfigDict, folder: Path) -> np.ndarray:
    """A sheet of held-out images and their reconstructions by the first stage in `folder`."""
    return reconstructions(*_trained(folder), _snapshot_images(config))


def evaluate(config: ConfigDict, folder: Path) -> dict:
    """Measure how the first stage in `folder` reconstructs held-out images. Raises ModuleNotFoundError without the
    package of LPIPS.
    """
    (model, variables), distances = _trained(folder), load_lpips()
    return evaluate_reconstruction(functools.partial(model.apply, variables), _held_out(config), distances)


def _trained(folder: Path) -> tuple[AutoencoderKL, PyTree]:
    if not (folder / "diffusion_pytorch_model.safetensors").exists():
        raise FileNotFoundError(f"no trained first stage in {folder}: run --mode=train first, or give its --workdir")
    return load_autoencoder(folder)


def _snapshot_images(config: ConfigDict) -> np.ndarray:
    """The held-out images, uint8, in a snapshot of a first stage."""
    return next(_held_out(config))["image"][:SHOWN]


def _held_out(config: ConfigDict) -> Iterator[Record]:
    """All held-out records in batches."""
    source = build.data.source(config, "validation", config.data.size)
    return _some_records(source, _resize(config), len(source))


def _resize(config: ConfigDict) -> Transform:
    return build.data.transform(config, (config.data.size, config.data.size))


def reconstructions(model: AutoencoderKL, variables: PyTree, images: np.ndarray) -> np.ndarray:
    """A sheet of uint8 images (B, H, W, 3), each above its reconstruction from the mean of its latent."""
    reconstructed = to_uint8(jax.jit(model.apply)(variables, to_float(images)))
    return pictures.grid([*images, *np.asarray(reconstructed)], columns=len(images))


def _images_only(transform: Transform) -> Transform:
    return lambda record, rng: {"image": transform(record, rng)["image"]}


def _latents(model: AutoencoderKL, variables: PyTree, source: Source, transform: Transform, seed: int) -> np.ndarray:
    """Means of the latents of SCALE_IMAGES images. They are shuffled by the seed, because a source may be sorted."""
    encode = jax.jit(lambda images: mode(model.apply(variables, to_float(images), method="encode")))
    batches = _some_records(source, transform, SCALE_IMAGES, seed)
    return np.concatenate([encode(batch["image"]) for batch in batches])


def normalized(model: AutoencoderKL, variables: PyTree, latents: np.ndarray) -> tuple[AutoencoderKL, PyTree]:
    """The autoencoder with what gives its latents unit variance: one scale, the inverse of their standard deviation
    (Rombach et al. 2022, appendix D.1), or with patch_size mean and variance of each channel.
    """
    if model.patch_size is None:
        return model.clone(scaling_factor=1 / float(np.std(latents))), variables
    cells = fold(jnp.asarray(latents), model.patch_size)
    statistics = {"running_mean": cells.mean(axis=(0, 1, 2)), "running_var": cells.var(axis=(0, 1, 2))}
    return model, {"params": variables["params"] | {"bn": statistics}}


def _some_records(source: Source, transform: Transform, count: int, seed: int | None = None) -> Iterator[Record]:
    """Batches of records, `count` in all or as many as there are. In the source's order, or shuffled by a seed."""
    # a divisor, so that all batches have one size and one program; the last is smaller if a record is bad
    size = max(n for n in range(1, BATCH + 1) if len(source) % n == 0)
    size = size if size >= BATCH // 4 else min(BATCH, len(source))
    records = one_epoch(source, size, transform, seed)
    return itertools.islice(records, -(-count // size))


def millions(params: PyTree) -> float:
    """The number of parameters in a pytree, in millions."""
    return sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6
