"""The convolutional U-Net of DDPM, ADM and Stable Diffusion."""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, Num

from diffusion_jax.models.attention import AttentionBlock2D, Transformer2DModel
from diffusion_jax.models.blocks import DownBlock, MidBlock, UpBlock
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers import (
    TARGET_WAVES,
    Conv,
    Downsample2D,
    GroupNorm,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    kernel_init,
    sinusoidal_embedding,
    zeros_init,
)
from diffusion_jax.models.unet_fields import BLOCK_TYPES, check_fields


class UNet(nn.Module):
    """A U-Net: (noisy image, time, condition) -> prediction of the same height and width.

    The fields are those of config.json of diffusers' `UNet2DConditionModel` and `UNet2DModel`, with the same meaning.
    Defaults are those of `UNet2DConditionModel` (Stable Diffusion 1). A tuple has one entry for each level.
    A control network can reuse `encode`, the downward half.

    block_out_channels: channels of each level, finest first.
    layers_per_block: residual blocks of a level.
    attention_head_dim: in `Attn…` blocks, channels of a head (None: one head of all channels). In `CrossAttn…` blocks
      it is the number of heads: a historical mistake that every published config relies on.
    upcast_attention: unused. Attention scores are always float32; diffusers reads it for half precision.
    attn_norm_num_groups: groups of the norm before the attention of UNetMidBlock2D. None means norm_num_groups, or no
      norm under resnet_time_scale_shift="scale_shift".
    mid_block_type: "UNetMidBlock2D" has two residual blocks with or without attention, or in a network with `Cross…`
      blocks one residual block, as in diffusers.
    transformer_layers_per_block: transformer blocks of each attention of a level, or a tuple with a number for each.
    reverse_transformer_layers_per_block: the same for up_blocks, in their order. None means those of the way down.
    num_class_embeds: size of the table of class embeddings. None for a network without classes.
    class_embed_type: "projection" for a network whose condition has one vector for the whole text, of width
      projection_class_embeddings_input_dim, which is added to the time embedding.
    addition_embed_type: "text_time" for a network whose condition has one vector for the whole text, and numbers about
      the image such as its size and crop (SDXL, Podell et al. 2023, section 2.2). Each number becomes sinusoidal waves
      of width addition_time_embed_dim. projection_class_embeddings_input_dim is the width of vector and waves together.
    time_cond_proj_dim: width of the embedding of a guidance scale, cond["guidance"], that the network takes as input
      (Meng et al. 2023, section 3.1; latent consistency models). None for a network without.

    Not in that config:
    target_embedding: the network is a flow map: cond["to"] is the end of a step (`core.denoiser.target_time`). A new
      one predicts the same for every target, because the embedding starts at zero.
    time_smoothing: of the derivative in t, see `sinusoidal_embedding`, in the unit of t. The fastest wave turns once in
      six of a thousand time steps, so the exact derivative does not show what was learned.
    dtype: of the large multiplications. Parameters, norms, softmax, time embedding and output are float32.
    remat: recompute residual blocks and transformer blocks in the backward pass instead of storing their activations.
    attention_implementation: see `attention`.
    """

    CONDITION_FIELDS = {  # noqa: RUF012  (no field) leaf of the condition -> the field that reads it, and its value
        "label": ("num_class_embeds", "the number of classes and one more"),
        "text_embeds": ("class_embed_type", "'projection'"),
    }
    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float | int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    dropout: float = 0.0
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    time_embedding_dim: int | None = None
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    add_attention: bool = True
    attention_head_dim: int | tuple[int, ...] | None = 8
    attn_norm_num_groups: int | None = None
    cross_attention_dim: int | None = 1280
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    upcast_attention: bool | None = False
    time_cond_proj_dim: int | None = None

    target_embedding: bool = False
    time_smoothing: float = 50.0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_implementation: str = "auto"

    @property
    def known_channels(self) -> int:
        """Channels of cond["known"] for an inpainting network, else 0."""
        return max(self.in_channels - self.out_channels, 0)

    @property
    def step(self) -> int:
        """Height and width of x are best multiples of it, which the network can halve as often as it does."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def cell(self) -> int:
        """1: x may have any height and width."""
        return 1

    @property
    def reads(self) -> dict[str, bool]:
        """Each leaf of a condition -> whether this network reads it."""
        return {
            "text": self._reads_text(),
            "label": self.num_class_embeds is not None,
            "text_embeds": self._has_vector(),
            "time_ids": self.addition_embed_type is not None,
            "known": self.known_channels > 0,
            "to": self.target_embedding,
            "guidance": self.time_cond_proj_dim is not None,
        }

    def setup(self):
        check_fields(self)
        channels, levels = self.block_out_channels, len(self.block_out_channels)
        width = self.time_embedding_dim or 4 * channels[0]
        self.time_embedding = TimestepEmbedding(width)
        if self.num_class_embeds is not None:
            self.class_embedding = nn.Embed(self.num_class_embeds, width, embedding_init=kernel_init)
        elif self.class_embed_type:
            self.class_embedding = TimestepEmbedding(width)
        if self.addition_embed_type:
            self.add_embedding = TimestepEmbedding(width)
        if self.target_embedding:
            self.to_embedding = TimestepEmbedding(width, zeros_init)
        self.conv_in = Conv(channels[0], dtype=self.dtype)
        self.down_blocks = [self._down_block(level) for level in range(levels)]
        if self.mid_block_type is not None:
            last = levels - 1
            depths = self._depths(last)[:1]
            alone = self.mid_block_type == "UNetMidBlock2D" and self._reads_text()
            attention = self._attention(self.mid_block_type, last, depths)
            attention = attention and functools.partial(attention, 0)
            self.mid_block = MidBlock(self._resnet(last), attention, layers=1 if alone else 2)
        self.up_blocks = [self._up_block(level) for level in reversed(range(levels))]
        self.conv_norm_out = GroupNorm(self.norm_num_groups, self.norm_eps)
        self.conv_out = Conv(self.out_channels, dtype=jnp.float32, init=zeros_init)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "#batch"] | Num[Array, ""],
        cond: Mapping[str, Array] = MappingProxyType({}),
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """Predict from the noisy image x at time t.

        t: () or (B,), in the network's own unit.
        cond: the condition, each entry with a batch axis in front.
          text (L, D) float, mask (L,) bool: the text; False marks padding. The mask is optional.
          label () int: the class.
          text_embeds (P,) float: the vector of class_embed_type or addition_embed_type.
          time_ids (N,) float: the numbers of addition_embed_type. For SDXL they are the height and width of the
            original image, top and left of the crop, height and width of the result, all in pixels.
          known (h, w, k) float: the known part of the image, for an inpainting network.
          to () float: the time of the target, of target_embedding.
          guidance () float: the guidance scale, of time_cond_proj_dim.
        keys: (B,), one for each image. They turn dropout on. The result of an image does not depend on its batch.
        Raises ValueError for fields that contradict each other, and for a missing or unknown condition.
        """
        h, skips, resnet_inputs = self.encode(x, t, cond, keys)
        return self.decode(h, skips, resnet_inputs, cond)

    def encode(
        self, x: Array, t: Array, cond: Mapping[str, Array], keys: Array | None = None
    ) -> tuple[Array, list[Array], tuple[Array, Array | None]]:
        """The downward half and the middle: (result, skips, inputs of the residual blocks). Arguments as in `__call__`.

        skips: inputs of the upward half, finest first.
        """
        self._check(x, cond)
        resnet_inputs = self._time_embedding(jnp.broadcast_to(t, x.shape[:1]), cond), keys
        if "known" in cond:
            x = jnp.concatenate([x, cond["known"]], axis=-1)
        x = self.conv_in(x)
        skips = [x]
        for block, kind in zip(self.down_blocks, self.down_block_types, strict=True):
            x, block_skips = block(x, resnet_inputs, *_context(kind, cond))
            skips += block_skips
        if self.mid_block_type is not None:
            x = self.mid_block(x, resnet_inputs, *_context(self.mid_block_type, cond))
        return x, skips, resnet_inputs

    def decode(
        self, x: Array, skips: Sequence[Array], resnet_inputs: tuple[Array, Array | None], cond: Mapping[str, Array]
    ) -> Float[Array, "batch height width out"]:
        """The upward half. Its inputs are the results of `encode`."""
        skips = list(skips)
        for block, kind in zip(self.up_blocks, self.up_block_types, strict=True):
            x = block(x, skips, resnet_inputs, *_context(kind, cond))
        return self.conv_out(nn.silu(self.conv_norm_out(x)))

    def example_inputs(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest valid (x, t, cond), all zeros, for `init` and for shape inference."""
        size, cond = 2 ** (len(self.block_out_channels) - 1), {}
        if self._reads_text():
            cond["text"] = jnp.zeros((1, 1, self.cross_attention_dim))
        if self.num_class_embeds is not None:
            cond["label"] = jnp.zeros((1,), jnp.int32)
        if self._has_vector():
            cond["text_embeds"] = jnp.zeros((1, self.projection_class_embeddings_input_dim))
        if self.addition_embed_type == "text_time":
            cond["time_ids"] = jnp.zeros((1, 0))
        if self.target_embedding:
            cond["to"] = jnp.zeros((1,))
        if self.time_cond_proj_dim is not None:
            cond["guidance"] = jnp.ones((1,))
        if self.known_channels:
            cond["known"] = jnp.zeros((1, size, size, self.known_channels))
        return jnp.zeros((1, size, size, self.in_channels - self.known_channels)), jnp.zeros((1,)), cond

    def _down_block(self, level: int) -> DownBlock:
        shrink = functools.partial(Downsample2D, self.block_out_channels[level], self.downsample_padding, self.dtype)
        return DownBlock(
            self._per_level("layers_per_block")[level],
            self._resnet(level),
            self._attention(self.down_block_types[level], level, self._depths(level)),
            shrink if level < len(self.block_out_channels) - 1 else None,
        )

    def _up_block(self, level: int) -> UpBlock:
        grow = functools.partial(Upsample2D, self.block_out_channels[level], self.dtype)
        return UpBlock(
            self._per_level("layers_per_block")[level] + 1,
            self._resnet(level),
            self._attention(self.up_block_types[-1 - level], level, self._depths(level, upward=True)),
            grow if level > 0 else None,
        )

    def _resnet(self, level: int) -> Callable[..., ResnetBlock2D]:
        """A function from name to the residual block of a level."""
        return functools.partial(
            self._rematted(ResnetBlock2D),
            self.block_out_channels[level],
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            time_scale_shift=self.resnet_time_scale_shift,
            dtype=self.dtype,
        )

    def _depths(self, level: int, upward: bool = False) -> tuple[int, ...]:
        """The number of transformer blocks in each attention of a level."""
        layers = self._per_level("layers_per_block")[level] + upward
        depths = self._per_level("transformer_layers_per_block")[level]
        if upward and self.reverse_transformer_layers_per_block is not None:
            depths = self.reverse_transformer_layers_per_block[-1 - level]
        depths = depths if isinstance(depths, tuple) else (depths,) * layers
        if len(depths) != layers:
            raise ValueError(
                f"UNet: expected {layers} numbers of transformer blocks, one for each attention of the level, got "
                f"{depths}; for the way up set reverse_transformer_layers_per_block"
            )
        return depths

    def _attention(self, block_type: str, level: int, depths: tuple[int, ...]) -> Callable[..., nn.Module] | None:
        """A function from (layer, name) to the attention of a block, or None for a block without attention."""
        heads = self._per_level("attention_head_dim")[level]
        shared = dict(dtype=self.dtype, implementation=self.attention_implementation)
        if BLOCK_TYPES[block_type] == "cross":
            make = functools.partial(
                Transformer2DModel,
                heads=heads,
                groups=self.norm_num_groups,
                linear_projection=self.use_linear_projection,
                only_cross_attention="Mid" not in block_type and self._per_level("only_cross_attention")[level],
                remat=self.remat,
                **shared,
            )
            return lambda layer, name: make(layers=depths[layer], name=name)
        in_the_middle = block_type == "UNetMidBlock2D"
        if BLOCK_TYPES[block_type] is None or (in_the_middle and not self.add_attention):
            return None
        groups = self.norm_num_groups
        if in_the_middle:
            groups = self.attn_norm_num_groups or (groups if self.resnet_time_scale_shift == "default" else None)
        make = self._rematted(AttentionBlock2D)
        return lambda layer, name: make(head_width=heads, groups=groups, eps=self.norm_eps, name=name, **shared)

    def _time_embedding(self, t: Array, cond: Mapping[str, Array]) -> Float[Array, "batch width"]:
        waves = functools.partial(
            sinusoidal_embedding, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        time_waves = waves(t, self.block_out_channels[0], smoothing=self.time_smoothing)
        temb = self.time_embedding(time_waves, self._guidance_embedding(cond))
        if self.target_embedding:
            temb += self.to_embedding(waves(TARGET_WAVES * cond["to"], self.block_out_channels[0]))
        if "label" in cond:
            temb += self.class_embedding(cond["label"])
        if self.class_embed_type:
            temb += self.class_embedding(cond["text_embeds"])
        if self.addition_embed_type:
            numbers = cond["time_ids"]
            number_waves = waves(numbers.reshape(-1), self.addition_time_embed_dim)
            number_waves = number_waves.reshape(len(t), numbers.shape[1] * self.addition_time_embed_dim)
            temb += self.add_embedding(jnp.concatenate([cond["text_embeds"], number_waves], axis=-1))
        return temb

    def _guidance_embedding(self, cond: Mapping[str, Array]) -> Float[Array, "batch width"] | None:
        if self.time_cond_proj_dim is None:
            return None
        return sinusoidal_embedding(1000 * (cond["guidance"] - 1), self.time_cond_proj_dim, False, freq_shift=1)

    def _rematted(self, module: type[nn.Module]) -> type[nn.Module]:
        return nn.remat(module) if self.remat else module

    def _per_level(self, field: str) -> tuple:
        value = getattr(self, field)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(self.block_out_channels)

    def _reads_text(self) -> bool:
        block_types = (*self.down_block_types, self.mid_block_type, *self.up_block_types)
        return any(BLOCK_TYPES.get(name) == "cross" for name in block_types)

    def _has_vector(self) -> bool:
        return self.class_embed_type == "projection" or self.addition_embed_type == "text_time"

    def _check(self, x: Array, cond: Mapping[str, Array]) -> None:
        needed = self.reads
        check_condition("UNet", needed, cond)
        known_channels = cond["known"].shape[-1] if needed["known"] else 0
        if x.shape[-1] + known_channels != self.in_channels:
            raise ValueError(
                f"UNet: expected {self.in_channels} input channels (last axis), got {x.shape[-1] + known_channels}"
            )
        if needed["text"] and cond["text"].shape[-1] != self.cross_attention_dim:
            raise ValueError(
                f"UNet: expected a text of width {self.cross_attention_dim}, got shape {cond['text'].shape}"
            )
        if self.class_embed_type and cond["text_embeds"].shape[-1] != self.projection_class_embeddings_input_dim:
            raise ValueError(
                f"UNet: expected text_embeds of width {self.projection_class_embeddings_input_dim}, got shape "
                f"{cond['text_embeds'].shape}"
            )
        if needed["time_ids"]:
            width, count = cond["text_embeds"].shape[-1], cond["time_ids"].shape[-1]
            if width + count * self.addition_time_embed_dim != self.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"UNet: text_embeds of width {width} and {count} time_ids of {self.addition_time_embed_dim} each "
                    f"do not make projection_class_embeddings_input_dim = {self.projection_class_embeddings_input_dim}"
                )


def _context(block_type: str, cond: Mapping[str, Array]) -> tuple:
    """The inputs of a block besides the image: the text and its mask."""
    return (cond["text"], cond.get("mask")) if BLOCK_TYPES[block_type] == "cross" else ()
