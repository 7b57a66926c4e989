"""Conversion between images and x0. Pixel space is latent space with the identity codec."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from diffusion_jax.data.transforms import to_float
from diffusion_jax.models.autoencoder import AutoencoderKL, fold, mean_and_std, mode, sample_gaussian, unfold

Images = UInt8[Array | np.ndarray, "batch height width 3"] | Float[Array | np.ndarray, "batch height width 3"]


class Codec(NamedTuple):
    """Images (B, H, W, 3) <-> x0 (B, H / factor, W / factor, channels).

    cache_key: () -> identifies the weights, part of the key of cached records. None if records should not be cached.
    encode: (params, images, uint8 or in [-1, 1]) -> record (B, ...), which can be stored, see `stored`.
    sample: (stats, record, keys (B,)) -> x0, float32, of about unit variance. If keys is None, the mean of x0.
    stats: numbers for `sample`.
    decode: (params, x0) -> images, about [-1, 1].
    params: weights for `encode` and `decode`.
    factor: pixels on a side of one cell of x0.
    channels: of x0.
    limit: x0 lies within [-limit, limit]. None if there is no limit.
    """

    cache_key: Callable[[], str] | None
    encode: Callable[[PyTree, Any], Any]
    sample: Callable[[PyTree, Array, Array | None], Array]
    stats: PyTree
    decode: Callable[[PyTree, Array], Array]
    params: PyTree
    factor: int
    channels: int
    limit: float | None


def stored(record: Array | np.ndarray) -> Array | np.ndarray:
    """A record as a cache keeps it: bfloat16 instead of float32, which is half the size. Pixels stay as they are."""
    return record.astype(jnp.bfloat16) if jnp.issubdtype(record.dtype, jnp.floating) else record


def check_size(size: tuple[int, int], factor: int) -> None:
    """Raise ValueError, with the nearest valid sizes, unless height and width are multiples of factor.

    size: height and width in pixels.
    factor: pixels on a side of one latent cell.
    """
    if any(pixels % factor or pixels < factor for pixels in size):
        nearest = [max(round(pixels / factor), 1) * factor for pixels in size]
        raise ValueError(
            f"height and width must be multiples of {factor} pixels, got {size[0]} and {size[1]}; "
            f"the nearest valid sizes are {nearest[0]} and {nearest[1]}"
        )


def pixels(images: Images) -> Float[Array | np.ndarray, "batch height width 3"]:
    """Convert images, uint8 or in [-1, 1], to numbers in [-1, 1]."""
    return to_float(images) if images.dtype == np.uint8 else images


def identity() -> Codec:
    """The codec of pixel models: records are the images, x0 is in [-1, 1]."""
    return Codec(
        cache_key=None,
        encode=lambda params, images: images,
        sample=lambda stats, record, keys: pixels(record),
        stats={},
        decode=lambda params, x0: x0,
        params={},
        factor=1,
        channels=3,
        limit=1.0,
    )


def autoencoder_kl(model: AutoencoderKL, variables: PyTree, tile: int = 0) -> Codec:
    """The codec of a KL autoencoder.

    Records are mean and standard deviation of z on the last axis, and x0 = (z - shift_factor) scaling_factor.

    With patch_size, records are the mean alone, folded, and x0 = (z - mean) / sqrt(variance + batch_norm_eps) by the
    statistics of each channel (FLUX.2).

    variables: of the model, or their shapes.
    tile: pixels on a side, 0 for no tiles. Larger images are decoded in tiles of this size, which overlap by a quarter
      and are blended. This saves memory. Faint seams may be visible, because each tile is normalised by itself.
    Raises ValueError for a tile that is not a multiple of four latent cells.
    """
    factor = model.factor
    if tile < 0 or tile % (4 * factor):
        raise ValueError(f"tile must be a multiple of {4 * factor} pixels, or 0 for none, got {tile}")
    stats = _scale_and_shift(model, variables)
    return Codec(
        cache_key=functools.partial(fingerprint, variables),
        encode=jax.jit(functools.partial(_encode_images, model)),
        sample=_sample_latent if model.patch_size is None else _scaled,
        stats=stats,
        decode=functools.partial(_decode_latent, model, tile),
        params=stats | {"variables": variables},
        factor=factor,
        channels=model.channels,
        limit=None,
    )


def _scale_and_shift(model: AutoencoderKL, variables: PyTree) -> dict[str, Array | jax.ShapeDtypeStruct]:
    """x0 = (z - shift) scale."""
    if model.patch_size is None:
        return {"scale": jnp.float32(model.scaling_factor), "shift": jnp.float32(model.shift_factor or 0.0)}

    def of_channels(mean: Array, variance: Array) -> dict[str, Array]:
        return {"scale": (jnp.float32(variance) + model.batch_norm_eps) ** -0.5, "shift": jnp.float32(mean)}

    statistics = variables["params"]["bn"]
    values = statistics["running_mean"], statistics["running_var"]
    is_known = not any(isinstance(value, jax.ShapeDtypeStruct) for value in values)
    return of_channels(*map(jnp.asarray, values)) if is_known else jax.eval_shape(of_channels, *values)


def _encode_images(model: AutoencoderKL, params: PyTree, images: Images) -> Array:
    moments = model.apply(params["variables"], pixels(images), method="encode")
    if model.patch_size:
        return fold(mode(moments), model.patch_size)
    # rounding the log variance to bfloat16 would change the standard deviation by up to 3 %, rounding that by 0.4 %
    return jnp.concatenate(mean_and_std(moments), axis=-1)


def _sample_latent(stats: PyTree, record: Array, keys: Array | None) -> Array:
    mean, std = jnp.split(record.astype(jnp.float32), 2, axis=-1)
    return _scaled(stats, mean if keys is None else sample_gaussian(mean, std, keys), keys)


def _scaled(stats: PyTree, z: Array, keys: Array | None) -> Array:
    return (z.astype(jnp.float32) - stats["shift"]) * stats["scale"]


def _decode_latent(model: AutoencoderKL, tile: int, params: PyTree, x0: Array) -> Array:
    z, cell = x0 / params["scale"] + params["shift"], model.factor
    if model.patch_size:
        z, cell = unfold(z, model.patch_size), cell // model.patch_size[0]
    decode = functools.partial(model.apply, params["variables"], method="decode")
    return in_tiles(decode, z, tile // cell) if tile and max(z.shape[1:3]) > tile // cell else decode(z)


def in_tiles(
    decode: Callable[[Array], Array], z: Float[Array, "batch h w c"], tile: int
) -> Float[Array, "batch height width channels"]:
    """`decode` applied to overlapping tiles of z, one after the other.

    tile: side of a tile in cells of z. A quarter of it overlaps the next tile, and its weight falls linearly there.
    """
    sides = z.shape[1:3]
    height, width = (min(tile, side) for side in sides)
    tops, lefts = (_starts(side, tile) for side in sides)
    corners = [(top, left) for top in tops for left in lefts]

    def decode_tile(corner: Array) -> Array:
        sizes = (len(z), height, width, z.shape[-1])
        return decode(jax.lax.dynamic_slice(z, (0, corner[0], corner[1], 0), sizes))

    tiles = jax.lax.map(decode_tile, jnp.array(corners))
    factor = tiles.shape[2] // height
    down, across = _fades(tops, height, sides[0], factor), _fades(lefts, width, sides[1], factor)
    whole = jnp.zeros((len(z), sides[0] * factor, sides[1] * factor, tiles.shape[-1]), tiles.dtype)
    for (top, left), tile_image in zip(corners, tiles, strict=True):
        weight = down[top][:, None, None] * across[left][:, None]
        region = np.s_[:, top * factor : (top + height) * factor, left * factor : (left + width) * factor]
        whole = whole.at[region].add(tile_image * weight.astype(tiles.dtype))
    return whole


def _starts(side: int, tile: int) -> list[int]:
    """Starts of the tiles: neighbours overlap by a quarter or more, and the last tile ends with the image."""
    last = max(side - tile, 0)
    return [*range(0, last, 3 * tile // 4), last]


def _fades(starts: list[int], size: int, side: int, factor: int) -> dict[int, np.ndarray]:
    """Start of a tile -> its weights along one axis, (size * factor,). The weights at every pixel sum to 1."""
    place = (np.arange(size * factor) + 0.5) / factor
    total, weights = np.zeros(side * factor), {}
    for start in starts:
        rise = np.ones_like(place) if start == 0 else np.minimum(4 * place / size, 1)
        fall = np.ones_like(place) if start + size == side else np.minimum(4 * (size - place) / size, 1)
        weights[start] = rise * fall
        total[start * factor : (start + size) * factor] += rise * fall
    return {start: w / total[start * factor : (start + size) * factor] for start, w in weights.items()}


def fingerprint(tree: PyTree) -> str:
    """SHA-256 of the names and values in a pytree of arrays."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
