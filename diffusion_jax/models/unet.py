"""The convolutional U-Net of DDPM, ADM and Stable Diffusion."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, Num

from diffusion_jax.models.attention import AttentionBlock2D, Transformer2DModel
from diffusion_jax.models.blocks import DownBlock, MidBlock, UpBlock
from diffusion_jax.models.layers import (
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

BLOCK_TYPES = {  # the peer's name of a block -> what follows each of its residual blocks
    "DownBlock2D": None,
    "AttnDownBlock2D": "self",
    "CrossAttnDownBlock2D": "cross",
    "UpBlock2D": None,
    "AttnUpBlock2D": "self",
    "CrossAttnUpBlock2D": "cross",
    "UNetMidBlock2D": "self",
    "UNetMidBlock2DCrossAttn": "cross",
}


class UNet(nn.Module):
    """Predicts from a noisy image, its time and a condition; image in, image of the same height and width out.

    The fields are those of the config.json of the peer's `UNet2DConditionModel` and `UNet2DModel`, with their meaning;
    the defaults are the former's (Stable Diffusion 1). A field that may be a tuple has an entry for each level.

    block_out_channels: channels of each level, finest first. layers_per_block: residual blocks of a level.
    attention_head_dim: in `Attn…` blocks the channels of a head (None: one head of all channels); in `CrossAttn…`
        blocks, by a historical slip that every published config relies on, the number of heads.
    upcast_attention: kept for the peer, whose scores need it in half precision; here they are always float32.
    attn_norm_num_groups: groups of the norm before the attention of UNetMidBlock2D; None means norm_num_groups, or no
        norm under resnet_time_scale_shift="scale_shift".
    num_class_embeds: size of the table of class embeddings; None for a network that knows no classes.
    addition_embed_type: "text_time" for a network that is told a vector of the whole text and numbers about the image,
        such as its size and crop (SDXL, Podell et al. 2023, section 2.2), each number as sinusoidal waves of width
        addition_time_embed_dim; projection_class_embeddings_input_dim is the width of all of these together.

    Not in the peer's config:
    dtype: of the large multiplications; parameters, norms, softmax, time embedding and output are float32.
    remat: recompute residual blocks and transformers in the backward pass instead of keeping their insides.
    attention_implementation: see `attention`.
    """

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
    num_class_embeds: int | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    projection_class_embeddings_input_dim: int | None = None
    add_attention: bool = True
    attention_head_dim: int | tuple[int, ...] | None = 8
    attn_norm_num_groups: int | None = None
    cross_attention_dim: int | None = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    upcast_attention: bool | None = False

    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention_implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "#batch"] | Num[Array, ""],
        encoder_hidden_states: Float[Array, "batch length text"] | None = None,
        encoder_attention_mask: Bool[Array, "batch length"] | None = None,
        class_labels: Int[Array, " batch"] | None = None,
        text_embeds: Float[Array, "batch pooled"] | None = None,
        time_ids: Num[Array, "batch numbers"] | None = None,
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """x: the noisy image. t: its time as the network knows it, one for each image or one for all.

        encoder_hidden_states, encoder_attention_mask: the text, and True where it is no padding.
        text_embeds, time_ids: the vector and the numbers of addition_embed_type. For SDXL the numbers are the height
        and width of the original image, top and left of the crop, height and width of the result, all in pixels.
        keys: one for each image. With them dropout is on, and what an image loses does not depend on its batch.
        Raises ValueError for fields that contradict each other, and for a condition that is missing or not known.
        """
        self._check(x, encoder_hidden_states, class_labels)
        self._check_added(text_embeds, time_ids)
        channels, levels = self.block_out_channels, len(self.block_out_channels)
        layers = self._per_level("layers_per_block")
        resnet = functools.partial(
            self._rematted(ResnetBlock2D),
            groups=self.norm_num_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            time_scale_shift=self.resnet_time_scale_shift,
            dtype=self.dtype,
        )

        seen = self._time_embedding(jnp.broadcast_to(t, x.shape[:1]), class_labels, text_embeds, time_ids), keys
        x = Conv(channels[0], name="conv_in", dtype=self.dtype)(x)

        skips = [x]
        for i, block_type in enumerate(self.down_block_types):
            attention, context = self._attention(block_type, i, encoder_hidden_states, encoder_attention_mask)
            downsample = functools.partial(Downsample2D, channels[i], self.downsample_padding, self.dtype)
            x, new = DownBlock(
                layers[i],
                functools.partial(resnet, channels[i]),
                attention,
                downsample if i < levels - 1 else None,
                name=f"down_blocks_{i}",
            )(x, seen, *context)
            skips += new

        if self.mid_block_type is not None:
            attention, context = self._attention(
                self.mid_block_type, levels - 1, encoder_hidden_states, encoder_attention_mask
            )
            x = MidBlock(functools.partial(resnet, channels[-1]), attention, name="mid_block")(x, seen, *context)

        for i, block_type in enumerate(self.up_block_types):
            level = levels - 1 - i
            attention, context = self._attention(block_type, level, encoder_hidden_states, encoder_attention_mask)
            upsample = functools.partial(Upsample2D, channels[level], self.dtype)
            x = UpBlock(
                layers[level] + 1,
                functools.partial(resnet, channels[level]),
                attention,
                upsample if level > 0 else None,
                name=f"up_blocks_{i}",
            )(x, skips, seen, *context)

        x = nn.silu(GroupNorm(self.norm_num_groups, self.norm_eps, name="conv_norm_out")(x))
        return Conv(self.out_channels, name="conv_out", dtype=jnp.float32, init=zeros_init)(x)

    def example_inputs(self) -> tuple:
        """The smallest zeros that this network takes, for `init` and for tracing its shapes."""
        size = 2 ** (len(self.block_out_channels) - 1)
        uses_text = any(BLOCK_TYPES.get(name) == "cross" for name in self._used_blocks())
        text = jnp.zeros((1, 1, self.cross_attention_dim)) if uses_text else None
        labels = None if self.num_class_embeds is None else jnp.zeros((1,), jnp.int32)
        added = ()
        if self.addition_embed_type == "text_time":
            added = jnp.zeros((1, self.projection_class_embeddings_input_dim)), jnp.zeros((1, 0))
        return jnp.zeros((1, size, size, self.in_channels)), jnp.zeros((1,)), text, None, labels, *added

    def _time_embedding(self, t, class_labels, text_embeds, time_ids):
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]
        waves = functools.partial(
            sinusoidal_embedding, flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        temb = TimestepEmbedding(width, name="time_embedding")(waves(t, self.block_out_channels[0]))
        if class_labels is not None:
            temb += nn.Embed(self.num_class_embeds, width, embedding_init=kernel_init, name="class_embedding")(
                class_labels
            )
        if self.addition_embed_type:
            numbers = waves(time_ids.reshape(-1), self.addition_time_embed_dim)
            numbers = numbers.reshape(len(t), time_ids.shape[1] * self.addition_time_embed_dim)
            temb += TimestepEmbedding(width, name="add_embedding")(jnp.concatenate([text_embeds, numbers], axis=-1))
        return temb

    def _attention(self, block_type, level, text, mask):
        """What makes the attention of a block from its name (or None), and what it looks at besides the image."""
        heads = self._per_level("attention_head_dim")[level]
        shared = dict(dtype=self.dtype, implementation=self.attention_implementation)
        kind = BLOCK_TYPES[block_type]
        if kind == "cross":
            make = functools.partial(
                self._rematted(Transformer2DModel),
                heads=heads,
                layers=self._per_level("transformer_layers_per_block")[level],
                groups=self.norm_num_groups,
                linear_projection=self.use_linear_projection,
                only_cross_attention="Mid" not in block_type and self._per_level("only_cross_attention")[level],
                **shared,
            )
            return make, (text, mask)
        groups = self.norm_num_groups
        if block_type == "UNetMidBlock2D":
            kind = kind if self.add_attention else None
            groups = self.attn_norm_num_groups or (groups if self.resnet_time_scale_shift == "default" else None)
        if kind is None:
            return None, ()
        make = self._rematted(AttentionBlock2D)
        return functools.partial(make, head_width=heads, groups=groups, eps=self.norm_eps, **shared), ()

    def _rematted(self, module: type[nn.Module]) -> type[nn.Module]:
        return nn.remat(module) if self.remat else module

    def _per_level(self, field: str) -> tuple:
        value = getattr(self, field)
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(self.block_out_channels)

    def _used_blocks(self) -> tuple[str, ...]:
        mid = () if self.mid_block_type is None else (self.mid_block_type,)
        return (*self.down_block_types, *mid, *self.up_block_types)

    def _check(self, x, text, class_labels):
        levels = len(self.block_out_channels)
        for field in (
            "down_block_types",
            "up_block_types",
            "layers_per_block",
            "attention_head_dim",
            "transformer_layers_per_block",
            "only_cross_attention",
        ):
            value = getattr(self, field)
            if isinstance(value, (tuple, list)) and len(value) != levels:
                raise ValueError(
                    f"UNet: {field} has {len(value)} entries, block_out_channels has {levels}; "
                    "give one entry for each level"
                )
        for part, field in (("Down", "down_block_types"), ("Mid", "mid_block_type"), ("Up", "up_block_types")):
            known = [name for name in BLOCK_TYPES if part in name]
            for name in np.atleast_1d(getattr(self, field) or ()):
                if name not in known:
                    raise ValueError(f"UNet: {field} has {str(name)!r}; known are {', '.join(known)}")
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ValueError(
                "UNet: resnet_time_scale_shift must be 'default' or 'scale_shift', "
                f"got {self.resnet_time_scale_shift!r}"
            )
        if x.shape[-1] != self.in_channels:
            raise ValueError(f"UNet: expected {self.in_channels} input channels (last axis), got shape {x.shape}")
        cross = any(BLOCK_TYPES[name] == "cross" for name in self._used_blocks())
        if cross and (text is None or text.shape[-1] != self.cross_attention_dim):
            got = "none" if text is None else f"shape {text.shape}"
            raise ValueError(f"UNet: expected encoder_hidden_states of width {self.cross_attention_dim}, got {got}")
        if (class_labels is None) != (self.num_class_embeds is None):
            raise ValueError(
                "UNet: class_labels and num_class_embeds go together; this network has num_class_embeds="
                f"{self.num_class_embeds} and was given {'no' if class_labels is None else 'some'} labels"
            )

    def _check_added(self, text_embeds, time_ids):
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(f"UNet: addition_embed_type must be None or 'text_time', got {self.addition_embed_type!r}")
        if self.addition_embed_type and (not self.addition_time_embed_dim or text_embeds is None or time_ids is None):
            raise ValueError("UNet: 'text_time' needs addition_time_embed_dim, and text_embeds and time_ids as input")
        if self.addition_embed_type:
            wide, width = text_embeds.shape[-1], self.addition_time_embed_dim
            if wide + time_ids.shape[-1] * width != self.projection_class_embeddings_input_dim:
                raise ValueError(
                    f"UNet: text_embeds of width {wide} and {time_ids.shape[-1]} time_ids of {width} each do not make "
                    f"projection_class_embeddings_input_dim = {self.projection_class_embeddings_input_dim}"
                )
        elif text_embeds is not None or time_ids is not None:
            raise ValueError("UNet: text_embeds and time_ids are for networks with addition_embed_type='text_time'")
