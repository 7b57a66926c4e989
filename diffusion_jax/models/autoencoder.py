"""The image autoencoder of latent diffusion (Rombach et al. 2022, section 3.1)."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from diffusion_jax.models.attention import AttentionBlock2D
from diffusion_jax.models.blocks import DownBlock, MidBlock
from diffusion_jax.models.layers import Conv, Downsample2D, GroupNorm, PointwiseConv, ResnetBlock2D, Upsample2D


class Encoder(nn.Module):
    """Image -> features. Each level but the last halves height and width.

    channels: of each level.
    layers: residual blocks of a level.
    out_channels: channels of the result.
    resnet, attention, norm: functions from name to submodule; attention may be None.
    """

    channels: tuple[int, ...]
    layers: int
    out_channels: int
    resnet: Callable
    attention: Callable | None
    norm: Callable
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x):
        x = Conv(self.channels[0], name="conv_in", dtype=self.dtype)(x)
        for i, width in enumerate(self.channels):
            downsample = functools.partial(Downsample2D, width, 0, self.dtype) if i < len(self.channels) - 1 else None
            x, _ = DownBlock(
                self.layers, functools.partial(self.resnet, width), None, downsample, name=f"down_blocks_{i}"
            )(x, ())
        x = MidBlock(functools.partial(self.resnet, self.channels[-1]), self.attention, name="mid_block")(x, ())
        x = nn.silu(self.norm(name="conv_norm_out")(x))
        return Conv(self.out_channels, name="conv_out", dtype=jnp.float32)(x)


class UpDecoderBlock(nn.Module):
    """Residual blocks, then optional upsampling."""

    layers: int
    resnet: Callable
    upsample: Callable | None

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = self.resnet(name=f"resnets_{i}")(x)
        return self.upsample(name="upsamplers_0")(x) if self.upsample else x


class Decoder(nn.Module):
    """The mirror of `Encoder`. Each level but the last doubles height and width; `channels` is coarsest first."""

    channels: tuple[int, ...]
    layers: int
    out_channels: int
    resnet: Callable
    attention: Callable | None
    norm: Callable
    dtype: DTypeLike

    @nn.compact
    def __call__(self, z):
        x = Conv(self.channels[0], name="conv_in", dtype=self.dtype)(z)
        x = MidBlock(functools.partial(self.resnet, self.channels[0]), self.attention, name="mid_block")(x, ())
        for i, width in enumerate(self.channels):
            upsample = functools.partial(Upsample2D, width, self.dtype) if i < len(self.channels) - 1 else None
            x = UpDecoderBlock(self.layers, functools.partial(self.resnet, width), upsample, name=f"up_blocks_{i}")(x)
        x = nn.silu(self.norm(name="conv_norm_out")(x))
        return Conv(self.out_channels, name="conv_out", dtype=jnp.float32)(x)


class Statistics(nn.Module):
    """Mean and variance of each channel, named as torch's BatchNorm2d names them. No gradient reaches them."""

    channels: int

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "channels"], Float[Array, "channels"]]:
        mean = self.param("running_mean", nn.initializers.zeros, (self.channels,))
        return mean, self.param("running_var", nn.initializers.ones, (self.channels,))


class AutoencoderKL(nn.Module):
    """Images -> Gaussian moments of latents, and latents -> images. The fields are those of diffusers' config.json.

    block_out_channels: channels of each level, finest first. The latent is 2^(levels - 1) times smaller than the image.
    layers_per_block: residual blocks of a level (one more in the decoder).
    latent_channels: C.
    scaling_factor, shift_factor: a diffusion model sees (z - shift_factor)·scaling_factor. Stored here, not applied.
    force_upcast: the weights overflow in float16, so compute in float32 when dtype is float16.
    patch_size: (height, width) of the patches of z that a diffusion model sees as one cell (`fold`), each channel with
      its own mean and variance, stored in `bn`, instead of shift_factor and scaling_factor (FLUX.2). None for no
      patches. Stored here, not applied.
    batch_norm_eps: added to that variance.
    decoder_block_out_channels: block_out_channels of the decoder, None for the same.
    dtype, remat, attention_implementation: as in `UNet`. Parameters, moments and images are float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 512
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    patch_size: tuple[int, int] | None = None
    batch_norm_eps: float = 1e-4
    decoder_block_out_channels: tuple[int, ...] | None = None

    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_implementation: str = "auto"

    @property
    def factor(self) -> int:
        """Pixels on a side of one cell that a diffusion model sees."""
        return 2 ** (len(self.block_out_channels) - 1) * (self.patch_size or (1,))[0]

    @property
    def channels(self) -> int:
        """Channels of such a cell."""
        return self.latent_channels * math.prod(self.patch_size or (1,))

    def setup(self):
        self._check_fields()
        groups, eps = self.norm_num_groups, 1e-6
        dtype = jnp.float32 if self.force_upcast and jnp.dtype(self.dtype) == jnp.float16 else self.dtype
        shared = dict(
            resnet=functools.partial(
                nn.remat(ResnetBlock2D) if self.remat else ResnetBlock2D, groups=groups, eps=eps, dtype=dtype
            ),
            attention=functools.partial(AttentionBlock2D, None, groups, eps, dtype, self.attention_implementation)
            if self.mid_block_add_attention
            else None,
            norm=functools.partial(GroupNorm, groups, eps),
            dtype=dtype,
        )
        self.encoder = Encoder(self.block_out_channels, self.layers_per_block, 2 * self.latent_channels, **shared)
        widths = self.decoder_block_out_channels or self.block_out_channels
        self.decoder = Decoder(widths[::-1], self.layers_per_block + 1, self.out_channels, **shared)
        if self.use_quant_conv:
            self.quant_conv = PointwiseConv(2 * self.latent_channels)
        if self.use_post_quant_conv:
            self.post_quant_conv = PointwiseConv(self.latent_channels)
        if self.patch_size:
            self.bn = Statistics(self.channels)

    def encode(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w moments"]:
        """Image in [-1, 1] -> mean and log variance of its latent on the last axis. Log variance is clipped to [-30,
        20].

        Raises ValueError if height or width is not a multiple of `factor`.
        """
        factor = self.factor
        if x.shape[1] % factor or x.shape[2] % factor or x.shape[3] != self.in_channels:
            raise ValueError(
                f"AutoencoderKL.encode: expected (batch, height, width, {self.in_channels}) with height and width "
                f"multiples of {factor}, got {x.shape}; resize or pad the images"
            )
        moments = self.encoder(x)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, -30.0, 20.0)], axis=-1)

    def decode(self, z: Float[Array, "batch h w latent"]) -> Float[Array, "batch height width channels"]:
        """Latent -> image, about [-1, 1] and not clipped. Raises ValueError for a wrong number of channels."""
        if z.shape[-1] != self.latent_channels:
            raise ValueError(
                f"AutoencoderKL.decode: expected {self.latent_channels} latent channels (last axis), "
                f"got shape {z.shape}"
            )
        return self.decoder(self.post_quant_conv(z) if self.use_post_quant_conv else z)

    def example_image(self) -> Float[Array, "1 height width channels"]:
        """The smallest valid input of `init`, all zeros."""
        return jnp.zeros((1, self.factor, self.factor, self.in_channels))

    def example_inputs(self) -> tuple[Array]:
        """The arguments of `init`."""
        return (self.example_image(),)

    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Reconstruct x from the mean of its latent. Uses every parameter, so `init` calls it."""
        if self.patch_size:
            self.bn()
        return self.decode(mode(self.encode(x)))

    def _check_fields(self) -> None:
        if self.patch_size and self.patch_size[0] != self.patch_size[1]:
            raise ValueError(f"AutoencoderKL: expected square patches, got patch_size = {self.patch_size}")
        widths = self.decoder_block_out_channels or self.block_out_channels
        if len(widths) != len(self.block_out_channels):
            raise ValueError(
                f"AutoencoderKL: expected {len(self.block_out_channels)} levels of the decoder, as many as of the "
                f"encoder, got decoder_block_out_channels = {widths}"
            )


def fold(z: Float[Array, "batch h w c"], size: tuple[int, int]) -> Float[Array, "batch rows columns channels"]:
    """Every patch of z as one cell, whose channels are those of z, each with its values row by row (FLUX.2).

    size: height and width of a patch. They divide those of z.
    """
    (b, h, w, c), (rows, columns) = z.shape, size
    z = z.reshape(b, h // rows, rows, w // columns, columns, c).transpose(0, 1, 3, 5, 2, 4)
    return z.reshape(b, h // rows, w // columns, c * rows * columns)


def unfold(x: Float[Array, "batch rows columns channels"], size: tuple[int, int]) -> Float[Array, "batch h w c"]:
    """The inverse of `fold`."""
    (b, h, w, _), (rows, columns) = x.shape, size
    x = x.reshape(b, h, w, -1, rows, columns).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, h * rows, w * columns, -1)


def mode(moments: Float[Array, "batch h w moments"]) -> Float[Array, "batch h w latent"]:
    """The mean of the latent distribution."""
    return jnp.split(moments, 2, axis=-1)[0]


def sample_moments(
    moments: Float[Array, "batch h w moments"], keys: Key[Array, " batch"]
) -> Float[Array, "batch h w latent"]:
    """Sample z from the latent distribution, with one key for each image."""
    return sample_gaussian(*mean_and_std(moments), keys)


def mean_and_std(
    moments: Float[Array, "batch h w moments"],
) -> tuple[Float[Array, "batch h w latent"], Float[Array, "batch h w latent"]]:
    """Mean and standard deviation, exp(logvar / 2), of the latent distribution."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * logvar)


def sample_gaussian(
    mean: Float[Array, "batch h w latent"], std: Float[Array, "batch h w latent"], keys: Key[Array, " batch"]
) -> Float[Array, "batch h w latent"]:
    """Sample z = mean + std·noise, with one key for each image."""
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys)
    return mean + std * noise
