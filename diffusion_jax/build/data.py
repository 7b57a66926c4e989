"""Config -> training data: source, transform, variants, batches."""

import pathlib

import jax
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import paths
from diffusion_jax.data import sources, transforms
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Transform, crop
from diffusion_jax.paths import Path


def source(config: ConfigDict, split: str, size: int) -> Source:
    """The records of config.data.

    split: "train", "validation" or "first_stage"; data.splits has the source's name for it.
    size: of images, pixels on a side, for sources with a choice.
    """
    data = config.data
    paths.local(data.cache, "config.data.cache")  # raises now and not when the first stage is trained
    name, data_dir = data.splits[split], data_folder(data)
    if data.source == "emoji":
        return sources.emoji(size, name, data_dir, data.styles, data.concepts)
    if data.source == "digits":
        return sources.digits(name)
    if data.source == "folder":
        if not data.path:
            raise ValueError("config.data.path is empty: name the folder of pictures of data.source=folder")
        return sources.folder(paths.local(data.path, "config.data.path"))
    if data.source.startswith("tfds:"):
        return sources.tfds_source(data.source.removeprefix("tfds:"), name, data_dir)
    raise ValueError(f"unknown data source {data.source!r}; known: emoji, digits, folder, tfds:NAME")


def data_folder(data: ConfigDict) -> pathlib.Path | None:
    """The folder data.data_dir, or None for the default of TFDS. Raises ValueError for one in a bucket."""
    return paths.local(data.data_dir, "config.data.data_dir") if data.data_dir else None


def cache_folder(data: ConfigDict, workdir: Path) -> pathlib.Path:
    """The folder data.cache for the outputs of frozen networks; by default workdir/cache, or for a work directory in a
    bucket a local folder, which the log names. Raises ValueError for one in a bucket.
    """
    if data.cache:
        return paths.local(data.cache, "config.data.cache")
    folder = paths.beside(workdir, "cache")
    if paths.in_bucket(workdir):
        logging.info("caching in %s (config.data.cache names another folder)", folder)
    return folder


def transform(config: ConfigDict, size: tuple[int, int], flip: bool = False) -> Transform:
    """The crop to `size` and the flip of config.data. flip: mirror half of the images even if config.data does not."""
    data = config.data
    return crop(*size, random_crop=data.random_crop, flip=data.flip or flip, upscale=data.upscale)


def variants(config: ConfigDict, size: tuple[int, int]) -> Transform:
    """All augmented versions of an image, for a cache: data.crops random crops or the centre crop, each also mirrored
    if data.flip is set. Time and disk space grow with their number.
    """
    data = config.data
    single_crop = crop(*size, random_crop=data.random_crop, upscale=data.upscale)
    return transforms.variants(single_crop, data.crops if data.random_crop else 1, data.flip)


def batches(source: Source, train: ConfigDict, seed: int, transform: Transform | None = None):
    """This host's share of the shuffled endless batches of a source."""
    return loader(
        source,
        train.batch_size // jax.process_count(),
        seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        transform=transform,
    )
