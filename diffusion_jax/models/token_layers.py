"""Parts of transformers: patches of an image, positions, rotation, norms, feed-forward, modulation.

Tokens are (batch, length, channels). An image is cut into patches row by row. Parameters are float32; `dtype` is the
type of the large multiplications. Norms, modulation and rotation are float32.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from diffusion_jax.models.layers import TARGET_WAVES, Dense, TimestepEmbedding, sinusoidal_embedding, zeros_init

WAVES = 256  # channels of the sinusoidal embedding of a time
PAIRS = ("adjacent", "half")
NORMS = ("layer_norm", "rms_norm")
embedding_init = nn.initializers.normal(0.02)


def token_norm(kind: str, eps: float, affine: bool) -> Callable[..., nn.Module]:
    """A function from name to a norm over channels, computed in float32.

    kind: "layer_norm" (Ba et al. 2016) or "rms_norm" (Zhang & Sennrich 2019).
    affine: whether it has a learned scale, and for layer_norm a learned bias.
    """
    shared = dict(epsilon=eps, dtype=jnp.float32, use_fast_variance=False, use_scale=affine)
    if kind == "rms_norm":
        return functools.partial(nn.RMSNorm, **shared)
    return functools.partial(nn.LayerNorm, use_bias=affine, **shared)


def patches(x: Num[Array, "batch height width channels"], size: int) -> Num[Array, "batch length values"]:
    """The patches of an image, row by row, each as its pixels row by row with the channels together.

    size: pixels on a side. It divides height and width.
    """
    b, h, w, c = x.shape
    x = x.reshape(b, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // size) * (w // size), size * size * c)


def image_of(
    tokens: Num[Array, "batch length values"], grid: tuple[int, int], size: int
) -> Num[Array, "batch height width channels"]:
    """The inverse of `patches`. grid: patches in a column and in a row."""
    b, (rows, columns) = len(tokens), grid
    x = tokens.reshape(b, rows, columns, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, rows * size, columns * size, -1)


def grid_positions(grid: tuple[int, int]) -> Float[np.ndarray, "length 2"]:
    """Row and column of every patch, row by row."""
    return np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), axis=-1).reshape(-1, 2).astype(np.float64)


def sincos_positions(
    grid: tuple[int, int], width: int, base: tuple[int, int] | None = None
) -> Float[np.ndarray, "length {width}"]:
    """Sines and cosines of column and row, the fixed positions of DiT (Peebles & Xie 2022; ViT's in MAE).

        [sin(c·w), cos(c·w), sin(r·w), cos(r·w)],   w_i = 10000^(-i / (width/4))

    base: the grid in training. Another one is stretched over the same range.
    Raises ValueError for a width that four does not divide.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions: expected a width that is a multiple of 4, got {width}")
    rows, columns = (grid_positions(grid) * (np.divide(base, grid) if base else 1)).T
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width // 4))
    waves = [wave(np.outer(place, frequencies)) for place in (columns, rows) for wave in (np.sin, np.cos)]
    return np.concatenate(waves, axis=-1).astype(np.float32)


def joint_mask(mask: Bool[Array, "batch words"], length: int) -> Bool[Array, "batch {length}"]:
    """The mask of a text, extended by the tokens of the image that follow it, which may all be attended to.

    length: of text and image together.
    """
    return jnp.pad(mask, [(0, 0), (0, length - mask.shape[1])], constant_values=True)


class Rotation(NamedTuple):
    """Rotary positions of tokens: cosine and sine of every angle, (..., length, width / 2)."""

    cos: Array
    sin: Array


def rotation(
    positions: Float[Array | np.ndarray, "*batch length axes"], widths: Sequence[int], theta: float
) -> Rotation:
    """The rotary positions (RoPE, Su et al. 2021) of tokens with several coordinates.

        angles of axis a:   p_a · theta^(-2i / width_a),   i = 0 .. width_a/2 - 1

    positions: the coordinates of each token. Those known in advance, numpy arrays, are computed in float64.
    widths: channels of a head for each axis, even; their sum is the width of a head.
    Raises ValueError for an odd width, and for another number of axes.
    """
    if len(widths) != positions.shape[-1] or any(width < 2 or width % 2 for width in widths):
        raise ValueError(f"rotation: expected {positions.shape[-1]} even widths, one for each axis, got {widths}")
    xp = jnp if isinstance(positions, jax.Array) else np
    angles = [positions[..., a, None] * theta ** -(np.arange(0, d, 2) / d) for a, d in enumerate(widths)]
    angles = xp.concatenate(angles, axis=-1)
    return Rotation(jnp.asarray(xp.cos(angles), jnp.float32), jnp.asarray(xp.sin(angles), jnp.float32))


def rotate(
    x: Num[Array, "batch length heads width"], by: Rotation, pairs: str = "adjacent"
) -> Num[Array, "batch length heads width"]:
    """Rotate pairs of channels of every head: (a, b) -> (a cos - b sin, b cos + a sin).

    pairs: "adjacent", channels 2i and 2i + 1. "half", channels i and i + width/2.
    """
    cos, sin = (table[..., :, None, :] for table in by)
    halves = x.astype(jnp.float32).reshape(*x.shape[:-1], *((-1, 2) if pairs == "adjacent" else (2, -1)))
    axis = -1 if pairs == "adjacent" else -2
    a, b = (jnp.take(halves, i, axis=axis) for i in range(2))
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=axis).reshape(x.shape).astype(x.dtype)


class GatedFeedForward(nn.Module):
    """down(silu(gate x) · up x), without biases (SwiGLU, Shazeer 2020).

    width: of the values between.
    maps: names of gate, up and down.
    """

    width: int
    maps: tuple[str, str, str]
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        project = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        gate, up, down = self.maps
        h = nn.silu(project(self.width, name=gate)(x)) * project(self.width, name=up)(x)
        return project(x.shape[-1], name=down)(h)


class PatchEmbed(nn.Module):
    """A linear map of every patch, plus its position.

    positions: "sincos" or "learned", added here, or None.
    base: patches (in a column, in a row) of an image in training: the size of the learned table, which is interpolated
      for other grids. None takes the grid of the image.
    """

    width: int
    patch_size: int
    positions: str | None = "sincos"
    base: tuple[int, int] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch length {self.width}"]:
        size = self.patch_size
        grid = x.shape[1] // size, x.shape[2] // size
        tokens = Dense(self.width, self.dtype, window=(size, size), name="proj")(patches(x, size))
        if self.positions == "sincos":
            places = sincos_positions(grid, self.width, self.base)
        elif self.positions == "learned":
            table = self.param("positions", embedding_init, (*(self.base or grid), self.width))
            places = jax.image.resize(table, (*grid, self.width), "bilinear").reshape(-1, self.width)
        else:
            return tokens
        return (tokens + places).astype(self.dtype)


class LabelEmbedding(nn.Module):
    """A vector for every class and one more, the last, for no class."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, label: Num[Array, "batch"]) -> Float[Array, "batch {self.width}"]:
        return nn.Embed(self.classes + 1, self.width, embedding_init=embedding_init, name="embedding_table")(label)


class ConditionEmbedding(nn.Module):
    """The vector that modulates the blocks: time, class, target of a flow map, guidance scale and interval.

    classes: None for a network without classes.
    freq_shift: of the waves of the time, see `sinusoidal_embedding`.
    smoothing: of their derivative, likewise.
    target: whether cond["to"] is read. Its part starts at zero.
    guidance_width: of the waves of cond["guidance"]; None for a network without.
    interval: whether cond["interval"] is read. Its part starts at zero.
    """

    width: int
    classes: int | None = None
    freq_shift: float | int = 0
    smoothing: float = 0.0
    target: bool = False
    guidance_width: int | None = None
    interval: bool = False

    @nn.compact
    def __call__(self, t: Num[Array, "batch"], cond: Mapping[str, Array]) -> Float[Array, "batch {self.width}"]:
        waves = functools.partial(sinusoidal_embedding, width=WAVES, freq_shift=self.freq_shift)
        guidance = None
        if self.guidance_width is not None:
            guidance = sinusoidal_embedding(1000 * (cond["guidance"] - 1), self.guidance_width, False, freq_shift=1)
        c = TimestepEmbedding(self.width, name="timestep_embedder")(waves(t, smoothing=self.smoothing), guidance)
        if self.target:
            c += TimestepEmbedding(self.width, zeros_init, name="to_embedding")(waves(TARGET_WAVES * cond["to"]))
        if self.interval:
            ends = jnp.concatenate([waves(TARGET_WAVES * end) for end in cond["interval"].T], axis=-1)
            c += TimestepEmbedding(self.width, zeros_init, name="interval_embedding")(ends)
        if self.classes is not None:
            c += LabelEmbedding(self.classes, self.width, name="class_embedder")(cond["label"])
        return c


class Modulation(nn.Module):
    """Vectors that shift, scale and gate tokens, a linear map of SiLU(c) that starts at zero (adaLN-zero, Peebles & Xie
    2022, section 3.2).

    count: of the vectors.
    bias: whether the map has one.
    """

    count: int
    bias: bool = True

    @nn.compact
    def __call__(self, c: Float[Array, "batch width"]) -> Float[Array, "{self.count} batch 1 width"]:
        vectors = Dense(self.count * c.shape[-1], use_bias=self.bias, init=zeros_init, name="linear")(nn.silu(c))
        return jnp.stack(jnp.split(vectors[:, None], self.count, axis=-1))


class EmbeddedModulation(nn.Module):
    """`Modulation` with an embedding of its own. Returns the vectors and the embedding.

    embedding: function from name to it.
    """

    count: int
    embedding: Callable[..., ConditionEmbedding]

    @nn.compact
    def __call__(self, t: Num[Array, "batch"], cond: Mapping[str, Array]) -> tuple[Array, Array]:
        c = self.embedding(name="emb")(t, cond)
        modulate = Modulation(self.count)
        nn.share_scope(self, modulate)
        return modulate(c), c


def modulated(
    x: Float[Array, "batch length width"], shift: Float[Array, "batch 1 width"], scale: Float[Array, "batch 1 width"]
) -> Float[Array, "batch length width"]:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift
