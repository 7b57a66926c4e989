"""The safety checker of Stable Diffusion 1 finds images that must not be shown. It compares CLIP's features of an image
with those of fixed texts.

Its folder is that of diffusers' `StableDiffusionSafetyChecker`: config.json beside model.safetensors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, UInt8
from PIL import Image

from diffusion_jax.interop.tensors import check_finite, read_tensors
from diffusion_jax.interop.vision import WEIGHTS, LoadedEncoder, load_image_encoder
from diffusion_jax.models.vision.vision import ImageEncoder
from diffusion_jax.paths import Path

CARE = 0.01  # all thresholds are lowered by this for an image that needs special care
TABLES = ("concept_embeds", "concept_embeds_weights", "special_care_embeds", "special_care_embeds_weights")


class SafetyChecker(NamedTuple):
    """concepts, special: features (N, D) of texts, of length 1.
    thresholds, special_thresholds: (N,) cosines above which an image matches a text.
    """

    loaded: LoadedEncoder
    concepts: Float[np.ndarray, "concepts features"]
    thresholds: Float[np.ndarray, "concepts"]
    special: Float[np.ndarray, "special features"]
    special_thresholds: Float[np.ndarray, "special"]

    def flagged(self, images: UInt8[np.ndarray, "batch height width 3"]) -> Bool[np.ndarray, "batch"]:
        """Which of the images must not be shown."""
        encoder = self.loaded.encoder
        prepared = np.stack([_prepared(image, encoder.image_size) for image in images])
        features = _features(encoder, self.loaded.mean, self.loaded.deviation, self.loaded.params, prepared)
        vectors = np.asarray(features, np.float64)
        needs_care = np.round(vectors @ self.special.T - self.special_thresholds, 3) > 0
        thresholds = self.thresholds - CARE * needs_care.any(axis=1, keepdims=True)
        return (np.round(vectors @ self.concepts.T - thresholds, 3) > 0).any(axis=1)


def load_safety_checker(folder: str | Path, allow_pickle: bool = False) -> SafetyChecker:
    """The safety checker of a folder.

    allow_pickle: see `read_tensors`.
    Raises FileNotFoundError for a missing file and ValueError for one of another layout or with values that are not
    finite.
    """
    loaded = load_image_encoder(folder, allow_pickle)
    tensors, source = read_tensors(folder, WEIGHTS, allow_pickle)
    missing = [name for name in TABLES if name not in tensors]
    if missing:
        raise ValueError(f"{source}: expected a safety checker with {', '.join(TABLES)}; it lacks {', '.join(missing)}")
    for name in TABLES:  # no picture would be flagged by a threshold that is NaN
        check_finite(name, tensors[name], source)
    concepts, thresholds, special, special_thresholds = (np.asarray(tensors[name], np.float64) for name in TABLES)
    return SafetyChecker(loaded, _unit(concepts), thresholds, _unit(special), special_thresholds)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _prepared(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The centre of an image whose shorter side is `side` pixels, as transformers' `CLIPImageProcessor` makes it."""
    sides = np.array(image.shape[:2])
    height, width = side * sides // sides.min()
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    return resized[top : top + side, left : left + side]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(
    encoder: ImageEncoder,
    mean: tuple[float, ...],
    deviation: tuple[float, ...],
    params: PyTree,
    images: UInt8[Array, "batch side side 3"],
) -> Float[Array, "batch features"]:
    """CLIP's features, of length 1."""
    features = encoder.apply(params, (images / 255.0 - jnp.array(mean)) / jnp.array(deviation))
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
