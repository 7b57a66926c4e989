"""Networks in whose features sets of pictures are compared. All have one form: pictures -> features (N, D).

A distance is named after its network: FID is the Frechet distance in the features of Inception-v3 alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion_jax import paths
from diffusion_jax.codec import fingerprint
from diffusion_jax.data.transforms import to_float
from diffusion_jax.evaluation.batches import mapped
from diffusion_jax.interop.encoders import load_text_encoder
from diffusion_jax.interop.inception import load_inception
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.interop.tokenizers import load_tokenizer
from diffusion_jax.interop.vision import load_image_encoder
from diffusion_jax.models.text.encoder import tokenize
from diffusion_jax.models.vision import inception
from diffusion_jax.models.vision.lpips import features

CLASSIFIERS = {"alexnet": ("alex", 224), "vgg16": ("vgg", 112)}  # weights, and pixels a side
VOCABULARIES = ("tokenizer.json", "vocab.json")
FILES = ("inception", "encoder")
PIXELS = 8  # on a side, of pictures compared by their pixels
KNOWN_NETWORKS = f"{', '.join(CLASSIFIERS)}, pixels, inception:FILE of FID's weights, encoder:FOLDER of CLIP or DINOv2"


class FeatureNetwork(NamedTuple):
    """A network for features of pictures.

    name: as in reports.
    resized: how pictures are resized for it, as in reports.
    extract: uint8 pictures (H, W, 3) of one size -> {"features": (N, D)}; a classifier for the Inception Score also
      gives "logits" (N, classes).
    weights: () -> a hash of its weights.
    texts: prompts -> (N, D) in the same space, for a whole CLIP model with its tokenizer. None for others.
    """

    name: str
    resized: str
    extract: Callable[[Sequence[np.ndarray]], dict[str, Float[np.ndarray, "pictures _"]]]
    weights: Callable[[], str]
    texts: Callable[[Sequence[str]], Float[np.ndarray, "prompts features"]] | None = None


def feature_network(name: str, allow_pickle: bool = False) -> FeatureNetwork:
    """The network of a name.

    name: "alexnet" or "vgg16", which come with the installation (their weights are those of LPIPS); "inception:FILE";
      "encoder:FOLDER"; or "pixels", for tiny pictures, whose features are the pixels themselves.
    allow_pickle: read weights in .pth and .bin files.
    Raises ValueError for another name, and what the loaders raise.
    """
    kind, _, path = name.partition(":")
    if name in CLASSIFIERS:
        return _classifier(name)
    if name == "pixels":
        return _pixels()
    if kind not in FILES or not path:
        raise ValueError(f"unknown feature network {name!r}; known: {KNOWN_NETWORKS}")
    return _inception(path, allow_pickle) if kind == "inception" else _encoder(path, allow_pickle)


def _network(name: str, resized: str, params: PyTree, apply: Callable) -> FeatureNetwork:
    """apply: params, uint8 (B, H, W, 3) -> dict of features."""
    extract = functools.partial(mapped, functools.partial(jax.jit(apply), params))
    return FeatureNetwork(name, resized, extract, functools.partial(fingerprint, params))


def _classifier(name: str) -> FeatureNetwork:
    net, side = CLASSIFIERS[name]

    def apply(params: PyTree, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        last = features(params, _resized(to_float(images), side))[-1]
        return {"features": last.mean(axis=(1, 2))}

    return _network(name, f"bicubic, antialiased, to {side} x {side}", load_lpips(net), apply)


def _pixels() -> FeatureNetwork:
    def apply(params: PyTree, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        return {"features": _resized(to_float(images), PIXELS).reshape(len(images), -1)}

    return _network("pixels", f"bicubic, antialiased, to {PIXELS} x {PIXELS}", {}, apply)


def _inception(path: str, allow_pickle: bool) -> FeatureNetwork:
    def apply(params: PyTree, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        outputs = inception.inception(params, images)
        return {"features": outputs.pooled, "logits": outputs.logits}

    resized = f"bilinear as in TensorFlow 1, to {inception.SIDE} x {inception.SIDE}"
    return _network("inception-v3", resized, load_inception(path, allow_pickle), apply)


def _encoder(folder: str, allow_pickle: bool) -> FeatureNetwork:
    loaded = load_image_encoder(folder, allow_pickle)
    side, encoder = loaded.encoder.image_size, loaded.encoder

    def apply(params: PyTree, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        pixels = _resized(images / 255.0, side)
        return {"features": encoder.apply(params, (pixels - jnp.array(loaded.mean)) / jnp.array(loaded.deviation))}

    network = _network(loaded.name, f"bicubic, antialiased, to {side} x {side}", loaded.params, apply)
    reads_prompts = loaded.reads_text and any((paths.at(folder) / file).exists() for file in VOCABULARIES)
    return network._replace(texts=_texts(folder, allow_pickle)) if reads_prompts else network


def _texts(folder: str, allow_pickle: bool) -> Callable[[Sequence[str]], Float[np.ndarray, "prompts features"]]:
    encoder, params = load_text_encoder(folder, allow_pickle=allow_pickle)
    tokenizer = load_tokenizer(folder, encoder.max_position_embeddings)
    pooled = jax.jit(lambda ids: encoder.apply(params, ids).pooled)
    return lambda prompts: mapped(pooled, tokenize(prompts, tokenizer, encoder.max_position_embeddings)[0])


def _resized(images: Float[Array, "batch height width 3"], side: int) -> Float[Array, "batch side side 3"]:
    return jax.image.resize(images, (len(images), side, side, 3), "cubic")
