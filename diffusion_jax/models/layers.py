"""Layers that the U-Net and the autoencoder share: time embedding, group norm, residual block, resampling.

Images are (batch, height, width, channels). Parameters are float32; `dtype` is the type of the large multiplications.
Initialisation follows DDPM (Ho et al. 2020): fan-average uniform kernels, and zeros for the last convolution of each
residual branch, so that a new residual block passes its input through.
"""

import functools
import math
import zlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from diffusion_jax.models.convolution import Padding, convolve, convolve_repeated, multiply

# compiled, so that it is traced once for each shape: Flax traces it at each call of a layer, to compare shapes
kernel_init = jax.jit(nn.initializers.variance_scaling(1.0, "fan_avg", "uniform"), static_argnums=(1, 2))
zeros_init = nn.initializers.zeros_init()
TARGET_WAVES = 0.016  # radians for a unit of cond["to"]: the fastest wave turns 2.5 times from clean data to noise


def updated_kernel(module: nn.Module, kernel: Float[Array | np.ndarray, "h w channels features"]) -> Array | np.ndarray:
    """The kernel of a convolution with its low-rank update, down up, if the module has one (`models.lora`)."""
    if not module.has_variable("lora", "down"):
        return kernel
    return kernel + module.get_variable("lora", "down") @ module.get_variable("lora", "up")


class Conv(nn.Module):
    """A 3x3 convolution.

    padding: pixels on every side, or (before, after) for height and for width.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    stride: int = 1
    padding: int | Padding = 1
    init: Callable = kernel_init

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        kernel = self.param("kernel", self.init, (3, 3, x.shape[-1], self.features))
        kernel = updated_kernel(self, kernel).astype(self.dtype)
        bias = self.param("bias", zeros_init, (self.features,)).astype(self.dtype)
        padding = [(self.padding, self.padding)] * 2 if isinstance(self.padding, int) else self.padding
        return convolve(x.astype(self.dtype), kernel, padding, self.stride) + bias


class Dense(nn.Module):
    """A linear map of the last axis. Variables of the collection "lora" add (x down) up to it (`models.lora`).

    window: height and width of the pixels that lie one after the other on the last axis. Checkpoints store the map as a
      convolution of this size.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    use_bias: bool = True
    init: Callable = kernel_init
    window: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: Num[Array, "*batch channels"]) -> Float[Array, "*batch features"]:
        channels = x.shape[-1]
        kernel = self.param("kernel", self.init, (*self.window, channels // math.prod(self.window), self.features))
        x = x.astype(self.dtype)
        y = multiply(x, kernel.reshape(channels, self.features).astype(self.dtype))
        if self.has_variable("lora", "down"):
            down, up = (self.get_variable("lora", name).astype(self.dtype) for name in ("down", "up"))
            y = y + multiply(multiply(x, down.reshape(channels, -1)).astype(self.dtype), up)
        if self.use_bias:
            y = y + self.param("bias", zeros_init, (self.features,)).astype(self.dtype)
        return y.astype(self.dtype)


# A 1x1 convolution is a linear map with a kernel of shape (1, 1, in, out).
PointwiseConv = functools.partial(Dense, window=(1, 1))


def sinusoidal_embedding(
    t: Num[Array, " batch"],
    width: int,
    flip_sin_to_cos: bool = True,
    freq_shift: float | int = 0,
    smoothing: float = 0.0,
) -> Float[Array, "batch width"]:
    """Sines and cosines of t at geometric frequencies (Vaswani et al. 2017, section 3.5).

        w_i = 10000^(-i / (width/2 - freq_shift)),   embedding = [sin(t·w), cos(t·w)], flipped: [cos(t·w), sin(t·w)]

    t: (B,), times in the network's own unit (steps, fractions allowed).
    width: channels of the result. An odd width ends in a zero.
    smoothing: the derivative in t is the difference quotient over t -+ this; that of fast waves is then nearly zero.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    fixed_t = jax.lax.stop_gradient(t).astype(jnp.float32)
    rates = frequencies * jnp.sinc(frequencies * smoothing / jnp.pi)
    angles = fixed_t[:, None] * frequencies + (t - fixed_t)[:, None] * rates
    waves = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.pad(jnp.concatenate(waves, axis=-1), [(0, 0), (0, width % 2)])


class TimestepEmbedding(nn.Module):
    """Two linear maps with a SiLU between. Float32, because it is small and every residual block depends on it.

    init: of the second map.
    bias: whether the maps have one.
    """

    width: int
    init: Callable = kernel_init
    bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch channels"], cond: Float[Array, "batch _"] | None = None
    ) -> Float[Array, "batch width"]:
        """cond: another embedding. A linear map of it, without bias, is added to x."""
        if cond is not None:
            x = x + Dense(x.shape[-1], use_bias=False, init=nn.initializers.zeros, name="cond_proj")(cond)
        x = Dense(self.width, use_bias=self.bias, name="linear_1")(x)
        return Dense(self.width, use_bias=self.bias, init=self.init, name="linear_2")(nn.silu(x))


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018), computed in float32 and returned as float32.

        y = (x - mean) / sqrt(var + eps) · scale + bias,   mean and var over the pixels and the channels of a group

    Means are taken over pixels first, then over the channels of a group, so that no large array is reshaped.
    Raises ValueError if `groups` does not divide the channels.
    """

    groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Num[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        channels = x.shape[-1]
        if channels % self.groups:
            raise ValueError(
                f"GroupNorm: {channels} channels cannot be split into {self.groups} groups; "
                "choose norm_num_groups that divides every entry of block_out_channels"
            )
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        mean = self._group_mean(x)
        slope = jax.lax.rsqrt(self._group_mean(jnp.square(x - mean)) + self.eps) * scale
        return x * slope + (bias - mean * slope)

    def _group_mean(self, x):
        """The mean of each channel's group, (B, H, W, C) -> (B, 1, 1, C)."""
        by_channel = x.mean(axis=(1, 2))
        by_group = by_channel.reshape(len(x), self.groups, -1).mean(axis=-1)
        return jnp.repeat(by_group, x.shape[-1] // self.groups, axis=-1)[:, None, None, :]


def dropout(
    x: Float[Array, "batch *shape"], rate: float, keys: Key[Array, "batch"], layer: int
) -> Float[Array, "batch *shape"]:
    """Set each number of x to 0 with probability `rate` and scale up the others (Srivastava et al. 2014).

    keys: (B,), one for each image, so that the result of an image does not depend on its batch.
    layer: identifies the layer, so that every layer drops different values.
    """
    keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0)


class ResnetBlock2D(nn.Module):
    """Residual block of DDPM / ADM: norm, SiLU, conv, time, norm, SiLU, dropout, conv, plus the input.

    out_channels: channels of the result. If the input has another number, it passes a 1x1 convolution.
    groups, eps: of the norms.
    dropout: rate in [0, 1), applied if the call gets keys.
    time_scale_shift: "default" adds the projected time embedding after the first convolution (DDPM). "scale_shift"
      scales and shifts the second norm with it (ADM, Dhariwal & Nichol 2021). No `temb`, no time projection.
    """

    out_channels: int
    groups: int = 32
    eps: float = 1e-5
    dropout: float = 0.0
    time_scale_shift: str = "default"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width _"],
        temb: Float[Array, "batch embedding"] | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """keys: (B,), one for each image. They turn dropout on."""
        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm1")(x))
        h = Conv(self.out_channels, name="conv1", dtype=self.dtype)(h)

        scale, shift = 0.0, 0.0
        if temb is not None:
            modulates = self.time_scale_shift == "scale_shift"
            width = self.out_channels * (2 if modulates else 1)
            temb = Dense(width, name="time_emb_proj")(nn.silu(temb))[:, None, None, :]
            if modulates:
                scale, shift = jnp.split(temb, 2, axis=-1)
            else:
                h = h + temb.astype(h.dtype)

        h = nn.silu(GroupNorm(self.groups, self.eps, name="norm2")(h) * (1 + scale) + shift)
        if keys is not None and self.dropout:
            h = dropout(h, self.dropout, keys, zlib.crc32("/".join(self.path).encode()))
        h = Conv(self.out_channels, name="conv2", dtype=self.dtype, init=zeros_init)(h)

        if x.shape[-1] != self.out_channels:
            x = PointwiseConv(self.out_channels, self.dtype, name="conv_shortcut")(x)
        return x + h


class Downsample2D(nn.Module):
    """A 3x3 convolution with stride 2. Padding 0 pads only right and below, as "SAME" in DDPM's TensorFlow code."""

    out_channels: int
    padding: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width _"]) -> Float[Array, "batch h w out"]:
        padding = [(self.padding, max(self.padding, 1))] * 2
        return Conv(self.out_channels, stride=2, padding=padding, name="conv", dtype=self.dtype)(x)


class UpsampledConv(nn.Module):
    """A 3x3 convolution of an image with every pixel repeated twice in both directions (`convolve_repeated`)."""

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width _"], size: tuple[int, int] | None = None
    ) -> Float[Array, "batch h w features"]:
        """size: (height, width). Crop the repeated image to it before the convolution."""
        kernel = updated_kernel(self, self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features)))
        bias = self.param("bias", zeros_init, (self.features,)).astype(self.dtype)
        return convolve_repeated(x.astype(self.dtype), kernel, size) + bias


class Upsample2D(nn.Module):
    """Double height and width by repeating pixels, then convolve. `size` may crop one row or column before that."""

    out_channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width _"], size: tuple[int, int] | None = None
    ) -> Float[Array, "batch h w out"]:
        return UpsampledConv(self.out_channels, self.dtype, name="conv")(x, size)
