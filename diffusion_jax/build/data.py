"""Config -> training data: source, transform, variants, batches."""

import functools
import pathlib
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import paths
from diffusion_jax.data import buckets, crops, order, sources
from diffusion_jax.data.crops import crop
from diffusion_jax.data.loader import Tally, loader
from diffusion_jax.data.mixture import mixed
from diffusion_jax.data.shards import KINDS, are_copied, shards
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Record, Transform
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path

KNOWN = "|".join(["emoji", "digits", *(f"{kind}:" for kind in ("folder", "tfds", *KINDS, "mix"))])
# Between the terms of a mixture: a plus before a number and *, or before a source with whatever is meant as its weight.
TERMS = re.compile(rf"\s\+\s+(?=[0-9.]+\s*\*)|\s*\+\s*(?=[^\s*/:+]*\s*\*\s*(?:{KNOWN})|[0-9.]*(?:{KNOWN})(?<=:))")


def source(config: ConfigDict, split: str, size: int, prepare: bool = True) -> Source:
    """The records of config.data.

    split: "train", "validation" or "first_stage"; data.splits has the source's name for it.
    size: of images, pixels on a side, for sources with a choice. Large JPEGs are decoded for crops of this size.
    prepare: let TFDS download and prepare a data set, if it has not; else that raises ValueError.
    """
    data = config.data
    return _source(data.source, data, data.splits[split], size, _kept(data), prepare)


def _kept(data: ConfigDict) -> pathlib.Path:
    """The folder for lists and copies of data."""
    return paths.local(data.cache, "config.data.cache") if data.cache else paths.CACHE / "data"


def by_size(config: ConfigDict, source: Source, model: DiffusionModel) -> list[tuple[tuple[int, int], Source]]:
    """Height and width of training images, and the records to train on in this size: one size, that of the model, or
    those of data.buckets.

    Raises ValueError for a source that cannot tell the sizes of its pictures without decoding them, and for a number of
    buckets or a size of the model that leaves no room for them.
    """
    data, (height, width) = config.data, model.size
    if not data.buckets:
        return [(model.size, source)]
    if source.measure is None:
        raise ValueError(
            "config.data.buckets needs the sizes of pictures in files, those of a folder, of shards, of TFDS or of a "
            f"mixture of these, and {data.source} does not tell them: set it to 0"
        )
    if height != width:
        raise ValueError(f"config.data.buckets needs a model of square images, got {width}x{height}")
    shapes = buckets.shapes(height, data.buckets, model.codec.factor * model.network.step)
    measured = buckets.sizes(source, _kept(data))
    groups = buckets.assigned(measured, shapes, config.train.batch_size, source.name)
    order.check(source.parts, np.flatnonzero(measured.all(axis=1)))
    return [(shape, buckets.chosen(source, indices)) for shape, indices in groups.items()]


def _source(
    text: str, data: ConfigDict, split: str, size: int, kept: pathlib.Path, prepare: bool, sharing: int = 1
) -> Source:
    """The source that a text describes.

    data: the section of the config.
    split: its name, which also replaces {split} in paths and patterns.
    kept: the folder for lists and copies of data.
    prepare: as in `source`.
    sharing: how many sources share its room, see `shards`.
    """
    kind, _, rest = text.partition(":")
    rest = rest.replace("{split}", split)
    if text == "emoji":
        return sources.emoji(size, split, data_folder(data), data.styles, data.concepts)
    if text == "digits":
        return sources.digits(split)
    if kind == "folder":
        if not (path := rest or data.path):
            raise ValueError("config.data.path is empty: name the folder of pictures of data.source=folder")
        return sources.folder(paths.local(path, f"config.data.{'source' if rest else 'path'}"), kept, size)
    if kind == "tfds":
        return sources.tfds_source(rest, split, data_folder(data), size, prepare)
    if kind in KINDS:
        return shards(kind, rest, kept, data.cache_gb * 1e9, size, sharing)
    if kind == "mix":
        weights, terms = zip(*map(_weighted, TERMS.split(rest)), strict=True)
        sharing = max(1, sum(map(_is_copied, terms)))
        return mixed([_source(term, data, split, size, kept, prepare, sharing) for term in terms], weights)
    raise ValueError(
        f"unknown data source {text!r}; known: emoji, digits, folder, folder:PATH, tfds:NAME, "
        f"{', '.join(f'{kind}:FILES' for kind in KINDS)}, mix:WEIGHT*SOURCE + WEIGHT*SOURCE"
    )


def _is_copied(text: str) -> bool:
    kind, _, rest = text.partition(":")
    return kind in KINDS and are_copied(kind, rest)


def _weighted(term: str) -> tuple[Fraction, str]:
    """A term of a mixture, as 0.3*folder:PATH."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)\s*\*\s*(.*\S)", term.strip())
    if not match or not Fraction(match[1]) or match[2].startswith("mix:") or match[2].endswith(" +"):
        raise ValueError(f"mix: expected 0.7*SOURCE + 0.3*SOURCE, with weights above 0, got the term {term.strip()!r}")
    return Fraction(match[1]), match[2]


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
        logging.log_first_n(logging.INFO, "caching in %s (config.data.cache names another folder)", 1, folder)
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
    return crops.variants(single_crop, data.crops if data.random_crop else 1, data.flip)


def batches(
    source: Source, train: ConfigDict, seed: int, transform: Transform | None = None, tally: Tally | None = None
) -> Callable[[int], Iterator[Record]]:
    """step -> this host's share of the batches after that step, shuffled and endless. tally: counts the records."""
    hosts = jax.process_count()
    return functools.partial(
        loader,
        source,
        train.batch_size // hosts,
        seed,
        transform,
        process_index=jax.process_index(),
        process_count=hosts,
        tally=tally,
    )
