"""The transformer of FLUX.2 (Black Forest Labs 2025): text and image first as two streams, then as one.

Field names follow config.json and layer names the state dict of diffusers' `Flux2Transformer2DModel`. No map has a
bias, and all blocks of a kind share the vectors that shift, scale and gate their tokens.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, Num, PyTree

from diffusion_jax.models.attention import attention
from diffusion_jax.models.conditions import check_condition
from diffusion_jax.models.layers import Dense, TimestepEmbedding, sinusoidal_embedding, zeros_init
from diffusion_jax.models.stacking import EACH, through
from diffusion_jax.models.token_layers import (
    Modulation,
    Rotation,
    grid_positions,
    joint_mask,
    modulated,
    rotate,
    rotation,
    token_norm,
)

REFERENCE_TIME = 10  # coordinate of the first reference picture, and the distance to the next one


def swiglu(h: Float[Array, "batch length _"]) -> Float[Array, "batch length _"]:
    """silu(a) · b, where [a, b] is h (Shazeer 2020)."""
    a, b = jnp.split(h, 2, axis=-1)
    return nn.silu(a) * b


class JointAttention(nn.Module):
    """Text and image, each with maps of its own, attend to both. Fields as of `Flux2Transformer`.

    Each head of q and of k is normalized, then rotated by the position of its token. The text comes first.
    """

    heads: int
    eps: float
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch pixels width"],
        text: Float[Array, "batch words width"],
        turn: Rotation,
        mask: Bool[Array, "batch length"] | None,
    ) -> tuple[Float[Array, "batch pixels width"], Float[Array, "batch words width"]]:
        project = functools.partial(Dense, x.shape[-1], self.dtype, use_bias=False)

        def in_heads(h, maps, norms):
            q, k, v = (project(name=name)(h).reshape(*h.shape[:2], self.heads, -1) for name in maps)
            return *(self._norm(name)(part) for name, part in zip(norms, (q, k), strict=True)), v

        of_text = in_heads(text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
        of_image = in_heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(of_text, of_image, strict=True))
        h = attended(q, k, v, turn, mask, self.implementation)
        words = text.shape[1]
        return project(name="to_out_0")(h[:, words:]), project(name="to_add_out")(h[:, :words])

    def _norm(self, name):
        return token_norm("rms_norm", self.eps, affine=True)(name=name)


def attended(
    q: Float[Array, "batch length heads width"],
    k: Float[Array, "batch length heads width"],
    v: Float[Array, "batch length heads width"],
    turn: Rotation,
    mask: Bool[Array, "batch length"] | None,
    implementation: str,
) -> Float[Array, "batch length channels"]:
    """Rotate q and k, attend, and join the heads."""
    q, k = (rotate(h, turn).astype(v.dtype) for h in (q, k))
    return attention(q, k, v, mask, implementation).reshape(*q.shape[:2], -1)


class FeedForward(nn.Module):
    """linear_out(swiglu(linear_in x)). width: of the values between."""

    width: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        project = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        return project(x.shape[-1], name="linear_out")(swiglu(project(2 * self.width, name="linear_in")(x)))


class DoubleBlock(nn.Module):
    """Joint attention, then a feed-forward of each stream, each with its residual. Fields as of `Flux2Transformer`."""

    heads: int
    ratio: float
    eps: float
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self,
        streams: tuple[Float[Array, "batch words width"], Float[Array, "batch pixels width"]],
        of_text: Float[Array, "6 batch 1 width"],
        of_image: Float[Array, "6 batch 1 width"],
        turn: Rotation,
        mask: Bool[Array, "batch length"] | None,
    ) -> tuple[Float[Array, "batch words width"], Float[Array, "batch pixels width"]]:
        """streams: text and image. of_text, of_image: shift, scale and gate of attention, then of the feed-forward."""
        norm = token_norm("layer_norm", self.eps, affine=False)
        text, x = (modulated(norm()(h), *m[:2]) for h, m in zip(streams, (of_text, of_image), strict=True))
        attend = JointAttention(self.heads, self.eps, self.dtype, self.implementation, name="attn")
        (x, text), results = attend(x, text, turn, mask), []
        for h, change, m, name in zip(streams, (text, x), (of_text, of_image), ("ff_context", "ff"), strict=True):
            h = h + (m[2] * change).astype(h.dtype)
            feed_forward = FeedForward(int(self.ratio * h.shape[-1]), self.dtype, name=name)
            results.append(h + (m[5] * feed_forward(modulated(norm()(h), *m[3:5]))).astype(h.dtype))
        return tuple(results)


class ParallelAttention(nn.Module):
    """Attention and feed-forward side by side, with one map into both and one out of both (Dehghani et al. 2023).

    Fields as of `Flux2Transformer`.
    """

    heads: int
    ratio: float
    eps: float
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], turn: Rotation, mask: Bool[Array, "batch length"] | None
    ) -> Float[Array, "batch length width"]:
        width, norm = x.shape[-1], token_norm("rms_norm", self.eps, affine=True)
        project = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        h = project(3 * width + 2 * int(self.ratio * width), name="to_qkv_mlp_proj")(x)
        *qkv, hidden = jnp.split(h, [width, 2 * width, 3 * width], axis=-1)
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in qkv)
        h = attended(norm(name="norm_q")(q), norm(name="norm_k")(k), v, turn, mask, self.implementation)
        return project(width, name="to_out")(jnp.concatenate([h, swiglu(hidden)], axis=-1))


class SingleBlock(nn.Module):
    """x + gate · attn(norm(x) (1 + scale) + shift). Fields as of `Flux2Transformer`."""

    heads: int
    ratio: float
    eps: float
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        vectors: Float[Array, "3 batch 1 width"],
        turn: Rotation,
        mask: Bool[Array, "batch length"] | None,
    ) -> Float[Array, "batch length width"]:
        shift, scale, gate = vectors
        attend = ParallelAttention(self.heads, self.ratio, self.eps, self.dtype, self.implementation, name="attn")
        h = attend(modulated(token_norm("layer_norm", self.eps, affine=False)()(x), shift, scale), turn, mask)
        return x + (gate * h).astype(x.dtype)


class TimeGuidanceEmbedding(nn.Module):
    """The vector of the time, plus that of the guidance scale, if the network reads it.

    width: of the vector. channels: of the waves.
    """

    width: int
    channels: int
    guidance: bool

    @nn.compact
    def __call__(self, t: Num[Array, "batch"], cond: Mapping[str, PyTree]) -> Float[Array, "batch {self.width}"]:
        embed = functools.partial(TimestepEmbedding, self.width, bias=False)
        c = embed(name="timestep_embedder")(sinusoidal_embedding(t, self.channels))
        if self.guidance:
            c += embed(name="guidance_embedder")(sinusoidal_embedding(1000 * cond["guidance"], self.channels))
        return c


class Flux2Transformer(nn.Module):
    """A transformer over latents: (noisy latents, time, text) -> prediction. Defaults are those of FLUX.2 klein 4B.

    in_channels, out_channels: of latents, a token each. None for as many out as in.
    num_layers, num_single_layers: blocks of two streams, then of one.
    attention_head_dim, num_attention_heads: width of a head, and their number; the width of tokens is their product.
    joint_attention_dim: width of the text.
    timestep_guidance_channels: of the waves of the time.
    mlp_ratio: width of the feed-forwards, in widths of tokens.
    axes_dims_rope: channels of a head that each coordinate rotates: of the reference picture, row, column, word.
    guidance_embeds: whether the network reads a guidance scale (FLUX.2-dev).

    Not in config.json:
    sample_size: height and width of the latents of a usual image.
    dtype: of the large multiplications. Parameters, norms, softmax, modulation and output are float32.
    remat, scan, attention_implementation: as of `models.transformer.Transformer`.
    """

    in_channels: int = 128
    out_channels: int | None = None
    num_layers: int = 5
    num_single_layers: int = 20
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 7680
    timestep_guidance_channels: int = 256
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    eps: float = 1e-6
    guidance_embeds: bool = False
    patch_size: int = 1

    sample_size: int = 64
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    scan: bool = False
    attention_implementation: str = "auto"

    known_channels = 0  # there is no input for the known part of an image
    target_embedding = False
    step = cell = 1  # of height and width of x

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def reads(self) -> dict[str, bool]:
        """Each leaf of a condition -> whether this network reads it."""
        return {"text": True, "guidance": self.guidance_embeds}

    def setup(self):
        self._check_fields()
        project = functools.partial(Dense, use_bias=False)
        self.time_guidance_embed = TimeGuidanceEmbedding(
            self.width, self.timestep_guidance_channels, self.guidance_embeds
        )
        self.double_stream_modulation_img = Modulation(6, bias=False)
        self.double_stream_modulation_txt = Modulation(6, bias=False)
        self.single_stream_modulation = Modulation(3, bias=False)
        self.x_embedder = project(self.width, self.dtype)
        self.context_embedder = project(self.width, self.dtype)
        double, single = map(self._block, (DoubleBlock, SingleBlock))
        if self.scan:
            self.transformer_blocks_each, self.single_transformer_blocks_each = double(), single()
        else:
            self.transformer_blocks = [double() for _ in range(self.num_layers)]
            self.single_transformer_blocks = [single() for _ in range(self.num_single_layers)]
        self.final_norm = token_norm("layer_norm", self.eps, affine=False)()
        self.norm_out = Modulation(2, bias=False)
        self.proj_out = project(self.out_channels or self.in_channels, init=zeros_init)

    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        t: Num[Array, "#batch"] | Num[Array, ""],
        cond: Mapping[str, PyTree] = MappingProxyType({}),
        keys: Key[Array, "batch"] | None = None,
    ) -> Float[Array, "batch height width out"]:
        """Predict eps - x0 from the noisy latents x at time t.

        t: () or (B,), 1000 sigma.
        cond: the condition, each entry with a batch axis in front.
          text (L, D) float, mask (L,) bool: the text; False marks padding. The mask is optional: published models
            attend to padding.
          guidance () float: the guidance scale, of guidance_embeds.
          references, a tuple of (rows, columns, channels) float: latents of reference pictures. Optional.
        keys: not used.
        Raises ValueError for fields that contradict each other, and for a missing or unknown condition.
        """
        self._check(x, cond)
        pictures, words, mask = (x, *cond.get("references", ())), cond["text"].shape[1], cond.get("mask")
        grids, tokens = [picture.shape[1:3] for picture in pictures], [*map(_tokens, pictures)]
        c = self.time_guidance_embed(jnp.broadcast_to(t, x.shape[:1]), cond)
        image = jnp.concatenate(tokens, axis=1)
        mask = None if mask is None else joint_mask(mask, words + image.shape[1])
        inputs = self._turn(grids, words), mask
        double, single = (
            getattr(self, name + EACH * self.scan) for name in ("transformer_blocks", "single_transformer_blocks")
        )
        streams = self.context_embedder(cond["text"]), self.x_embedder(image)
        vectors = self.double_stream_modulation_txt(c), self.double_stream_modulation_img(c)
        h = jnp.concatenate(through(double, self.num_layers, streams, *vectors, *inputs), axis=1)
        h = through(single, self.num_single_layers, h, self.single_stream_modulation(c), *inputs)
        h, (scale, shift) = h[:, words : words + tokens[0].shape[1]], self.norm_out(c)
        return self.proj_out(modulated(self.final_norm(h), shift, scale)).reshape(*x.shape[:3], -1)

    def example_inputs(self) -> tuple[Array, Array, dict[str, Array]]:
        """The smallest valid (x, t, cond), all zeros, for `init` and for shape inference."""
        cond = {"text": jnp.zeros((1, 1, self.joint_attention_dim))}
        if self.guidance_embeds:
            cond["guidance"] = jnp.ones((1,))
        return jnp.zeros((1, 1, 1, self.in_channels)), jnp.zeros((1,)), cond

    def _block(self, block: type[nn.Module]) -> Callable[[], nn.Module]:
        return functools.partial(
            nn.remat(block, prevent_cse=not self.scan) if self.remat else block,
            self.num_attention_heads,
            self.mlp_ratio,
            self.eps,
            self.dtype,
            self.attention_implementation,
        )

    def _turn(self, grids: Sequence[tuple[int, int]], words: int) -> Rotation:
        """The rotary positions of the tokens: those of a text, of the noisy latents, and of each reference picture.

        grids: rows and columns of the latents, then of the pictures.
        """
        of_text = np.zeros((words, 4))
        of_text[:, 3] = np.arange(words)
        of_grids = [
            np.pad(grid_positions(grid), ((0, 0), (1, 1)), constant_values=((0, 0), (REFERENCE_TIME * i, 0)))
            for i, grid in enumerate(grids)
        ]
        return rotation(np.concatenate([of_text, *of_grids]), self.axes_dims_rope, self.rope_theta)

    def _check_fields(self) -> None:
        if len(self.axes_dims_rope) != 4 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                f"Flux2Transformer: axes_dims_rope must be four widths that add up to attention_head_dim = "
                f"{self.attention_head_dim}, got {self.axes_dims_rope}"
            )
        if self.patch_size != 1 or min(self.num_layers, self.num_single_layers) < 1:
            raise ValueError(
                f"Flux2Transformer: expected patch_size 1 and at least one block of each kind, got patch_size "
                f"{self.patch_size}, num_layers {self.num_layers}, num_single_layers {self.num_single_layers}"
            )

    def _check(self, x: Array, cond: Mapping[str, PyTree]) -> None:
        check_condition("Flux2Transformer", self.reads, cond, optional=("references",))
        widths = x.shape[-1], cond["text"].shape[-1]
        if widths != (self.in_channels, self.joint_attention_dim):
            raise ValueError(
                f"Flux2Transformer: expected {self.in_channels} input channels and a text of width "
                f"{self.joint_attention_dim}, got {widths[0]} and {widths[1]}"
            )
        if any(picture.shape[-1] != self.in_channels for picture in cond.get("references", ())):
            shapes = ", ".join(str(picture.shape) for picture in cond["references"])
            raise ValueError(f"Flux2Transformer: expected references of {self.in_channels} channels, got {shapes}")


def _tokens(picture: Float[Array, "batch rows columns channels"]) -> Float[Array, "batch length channels"]:
    return picture.reshape(len(picture), -1, picture.shape[-1])
