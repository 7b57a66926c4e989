"""Retrieval: find the nearest of many known pictures, in the features of a classifier."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from diffusion_jax.data.transforms import to_float
from diffusion_jax.evaluation.batches import mapped
from diffusion_jax.models.vision.lpips import features

STAGES = (2, 4)  # of AlexNet and VGG16: the third and the last
CELLS = 2  # cells on a side over which features are averaged
MAX_DIRECTIONS = 256  # directions after whitening

Features = Callable[[Sequence[np.ndarray]], Float[np.ndarray, "pictures features"]]


def classifier_features(params: dict) -> Features:
    """Features of grey pictures (H, W), uint8: two stages of a classifier, each averaged over 2 x 2 cells.

    params: from `interop.lpips.load_lpips`.
    """

    @jax.jit
    def of_batch(images: UInt8[Array, "batch height width"]) -> Float[Array, "batch features"]:
        pixels = jnp.repeat(to_float(images)[..., None], 3, axis=-1)
        stages = features(params, pixels)
        return jnp.concatenate([_cells(stages[stage]) for stage in STAGES], axis=-1)

    return functools.partial(mapped, of_batch)


def _cells(x: Float[Array, "batch height width channels"]) -> Float[Array, "batch cells"]:
    cells = jax.image.resize(x, (len(x), CELLS, CELLS, x.shape[-1]), "linear").reshape(len(x), -1)
    return cells / jnp.linalg.norm(cells, axis=-1, keepdims=True).clip(1e-6)


class Gallery(NamedTuple):
    """Known pictures as unit vectors, whitened: they have the same variance in each of `rank` directions.

    vectors: (N, rank).
    project: features (M, F) -> unit vectors (M, rank).
    """

    vectors: Float[np.ndarray, "pictures rank"]
    project: Callable[[np.ndarray], np.ndarray]


def gallery(known_features: Float[np.ndarray, "pictures features"]) -> Gallery:
    """A gallery of the features of known pictures."""
    mean = known_features.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(known_features - mean, rowvar=False))
    rank = min(MAX_DIRECTIONS, len(known_features) - 1, known_features.shape[1])
    whitening = directions[:, -rank:] / np.sqrt(np.maximum(variances[-rank:], 1e-12))

    def project(queries: np.ndarray) -> np.ndarray:
        vectors = (queries - mean) @ whitening
        return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-12)

    return Gallery(project(known_features), project)


def ranks(
    similarities: Float[np.ndarray, "queries pictures"],
    targets: Int[np.ndarray, " queries"],
    candidates: Bool[np.ndarray, "queries pictures"],
) -> Int[np.ndarray, " queries"]:
    """How many candidates are more similar to each query than its target.

    similarities: of each query to each known picture.
    targets: the known picture that each query should be nearest to.
    candidates: which of the known pictures count.
    """
    threshold = similarities[np.arange(len(similarities)), targets][:, None]
    return (candidates & (similarities > threshold)).sum(axis=-1)
