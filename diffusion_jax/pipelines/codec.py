"""How images become what the denoiser sees, and back. Pixel space is latent space with the identity codec."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion_jax.data.transforms import to_float
from diffusion_jax.models.autoencoder import AutoencoderKL, mode, sample_moments

Images = UInt8[Array | np.ndarray, "batch height width 3"] | Float[Array | np.ndarray, "batch height width 3"]


class Codec(NamedTuple):
    """Images (B, H, W, 3) <-> x0 (B, H / factor, W / factor, channels).

    name: says which weights, part of cache keys; "" when there is nothing worth caching.
    encode: images, uint8 or in [-1, 1] -> record (B, ...), what is stored of them.
    draw: (stats, record, keys (B,)) -> x0, of about unit variance; with keys None its mean. stats: the numbers that
    `draw` needs.
    decode: (params, x0) -> images, about [-1, 1]. params: what `decode` needs.
    limit: x0 is known to lie within [-limit, limit]; None when nothing is known.
    """

    name: str
    encode: Callable[[Any], Any]
    draw: Callable[[PyTree, Array, Array | None], Array]
    stats: PyTree
    decode: Callable[[PyTree, Array], Array]
    params: PyTree
    factor: int
    channels: int
    limit: float | None


def pixels(images: Images) -> Float[Array | np.ndarray, "batch height width 3"]:
    """Images as numbers in [-1, 1], from uint8 or from such numbers."""
    return to_float(images) if images.dtype == np.uint8 else images


def identity() -> Codec:
    """Pixels as they are: records are the images, x0 is in [-1, 1]."""
    return Codec(
        name="",
        encode=lambda images: images,
        draw=lambda stats, record, keys: pixels(record),
        stats={},
        decode=lambda params, x0: x0,
        params={},
        factor=1,
        channels=3,
        limit=1.0,
    )


def autoencoder_kl(model: AutoencoderKL, variables: PyTree) -> Codec:
    """Latents of a KL autoencoder: records are moments, x0 = (z - shift_factor) scaling_factor."""
    stats = {"scale": jnp.float32(model.scaling_factor), "shift": jnp.float32(model.shift_factor or 0.0)}
    encode = jax.jit(lambda variables, images: model.apply(variables, pixels(images), method="encode"))
    return Codec(
        name=fingerprint(variables),
        encode=functools.partial(encode, variables),
        draw=_draw_latent,
        stats=stats,
        decode=functools.partial(_decode_latent, model),
        params=stats | {"variables": variables},
        factor=2 ** (len(model.block_out_channels) - 1),
        channels=model.latent_channels,
        limit=None,
    )


def _draw_latent(stats: PyTree, moments: Array, keys: Array | None) -> Array:
    z = mode(moments) if keys is None else sample_moments(moments, keys)
    return (z - stats["shift"]) * stats["scale"]


def _decode_latent(model: AutoencoderKL, params: PyTree, x0: Array) -> Array:
    return model.apply(params["variables"], x0 / params["scale"] + params["shift"], method="decode")


def fingerprint(tree: PyTree) -> str:
    """SHA-256 over the names and values of a pytree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
