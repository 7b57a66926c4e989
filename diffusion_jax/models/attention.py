"""Attention over sequences and over the pixels of an image."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from diffusion_jax.compilation import backend, has_kernels, is_undivided
from diffusion_jax.models import fused
from diffusion_jax.models.layers import Dense, GroupNorm, PointwiseConv, kernel_init, zeros_init
from diffusion_jax.models.token_layers import Rotation, rotate

BLOCK = 512  # queries in one block of "blocks"
SCORES = 2**21  # of all heads at a time in "blocks", unless one head has more: they then stay in the processor's cache
ON_CHIP = 2**25  # scores of all images and heads, 128 MiB in float32, for which a TPU's own memory is too small
LARGE = 2**29  # scores, 2 GiB in float32, that a TPU does not hold at once
TOKENS = 1024  # at a time in `FeedForward` on CPU
IMPLEMENTATIONS = ("auto", "blocks", "xla", "cudnn", "flash")
ACTIVATIONS = {  # name in diffusers -> the function, and whether its result multiplies another map
    "geglu": (functools.partial(nn.gelu, approximate=False), True),
    "swiglu": (nn.silu, True),
    "gelu": (functools.partial(nn.gelu, approximate=False), False),
    "gelu-approximate": (functools.partial(nn.gelu, approximate=True), False),
}


def attention(
    q: Float[Array, "batch queries heads width"],
    k: Float[Array, "batch keys heads width"],
    v: Float[Array, "batch keys heads width"],
    mask: Bool[Array, "batch keys"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "batch queries heads width"]:
    """softmax(q·kᵀ / sqrt(width))·v, the softmax in float32 (Vaswani et al. 2017, eq. 1).

    mask: True for the keys that queries may attend to. None is all keys.
    implementation: "xla", one softmax over the whole score matrix. "blocks", a few heads and at most 512 queries at a
      time; the backward pass recomputes the scores, so memory grows linearly with the number of queries. "cudnn" and
      "flash", the fused kernels of GPUs and TPUs; the compiler cannot divide that of TPUs over devices. "auto", blocks
      on CPU, cudnn on GPU if possible, flash on TPU for more scores than the chip keeps, xla elsewhere.
    Raises ValueError for another implementation.
    """
    if implementation == "auto":
        implementation = _best_implementation(q, k)
    if implementation == "xla":
        return _whole(q, k, v, mask)
    if implementation == "blocks":
        return _in_blocks(q, k, v, mask)
    if implementation == "cudnn":
        return fused.cudnn(q, k, v, mask)
    if implementation == "flash":
        return fused.flash(q, k, v, mask)
    raise ValueError(f"attention_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


def _best_implementation(q, k) -> str:
    on = backend()
    if on == "cpu":
        return "blocks"
    if on == "tpu":  # by the compiler's account, docs/tpu.md
        images, queries, heads, _ = q.shape
        keys = k.shape[1]
        scores = images * heads * queries * keys
        if scores >= ON_CHIP and keys >= 1024 and is_undivided() and has_kernels():
            return "flash"
        return "blocks" if scores >= LARGE else "xla"
    fits = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128
    is_here = jax.default_backend() == "gpu"  # to count for a GPU elsewhere needs no cuDNN
    return "cudnn" if on == "gpu" and fits and is_here and has_kernels() else "xla"


def _whole(q, k, v, mask):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    return jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores).astype(v.dtype), v)


def _in_blocks(q, k, v, mask):
    b, queries, heads, width = q.shape
    blocks = math.ceil(queries / BLOCK)
    size = math.ceil(queries / blocks)
    group = _largest_divisor(b * heads, SCORES // (size * k.shape[1]))
    attend = functools.partial(_group_in_blocks, blocks=blocks)
    # scale q and not the scores: q has fewer numbers
    q = jnp.pad(q / math.sqrt(width), [(0, 0), (0, blocks * size - queries), (0, 0), (0, 0)])
    # join images and heads: XLA on CPU multiplies matrices several times as fast with one axis before them
    q, k, v = (x.swapaxes(1, 2).reshape(-1, group, x.shape[1], width) for x in (q, k, v))
    mask = None if mask is None else jnp.repeat(mask, heads, axis=0).reshape(-1, group, 1, mask.shape[1])
    out = jax.lax.map(lambda each: attend(*each), (q, k, v, mask))
    return out.reshape(b, heads, -1, width).swapaxes(1, 2)[:, :queries]


def _block(q, k, v, mask):
    """q (heads, queries, width), divided by sqrt(width); k, v (heads, keys, width); mask (heads, 1, keys) or None."""
    scores = jnp.einsum("hqd,hkd->hqk", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.einsum("hqk,hkd->hqd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)  # divide last: out has fewer numbers


def _group_in_blocks(q, k, v, mask, blocks):
    """Attention for a few heads at once, (heads, queries, width)."""
    if blocks == 1:
        return _block(q, k, v, mask)
    split = q.reshape(len(q), blocks, -1, q.shape[-1]).swapaxes(0, 1)
    attend = jax.checkpoint(lambda block: _block(block, k, v, mask))
    return jax.lax.map(attend, split).swapaxes(0, 1).reshape(q.shape)


def _largest_divisor(number, limit):
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(limit, 1))


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to a context.

    bias, out_bias: whether the maps to q, k and v have a bias, and the output map.
    out_init: initializer of the output map.
    qk_norm: function from name to a norm of each head of q and of k; None for none.
    pairs: channels that a rotation turns together, see `token_layers.rotate`.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    bias: bool = False
    out_init: Callable = kernel_init
    qk_norm: Callable[..., nn.Module] | None = None
    pairs: str = "adjacent"
    out_bias: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch queries channels"],
        context: Float[Array, "batch keys _"] | None = None,
        mask: Bool[Array, "batch keys"] | None = None,
        turn: Rotation | None = None,
    ) -> Float[Array, "batch queries channels"]:
        """turn: the rotary positions of the tokens, for attention to itself."""
        context, width = x if context is None else context, x.shape[-1] // self.heads
        project = functools.partial(Dense, self.heads * width, self.dtype, self.bias)
        projected = project(name="to_q")(x), project(name="to_k")(context), project(name="to_v")(context)
        q, k, v = (h.reshape(*h.shape[:2], self.heads, width) for h in projected)
        if self.qk_norm is not None:
            q, k = (self.qk_norm(name=f"norm_{name}")(h).astype(v.dtype) for name, h in (("q", q), ("k", k)))
        if turn is not None:
            q, k = rotate(q, turn, self.pairs), rotate(k, turn, self.pairs)
        h = attention(q, k, v, mask, self.implementation).reshape(*x.shape[:2], self.heads * width)
        return Dense(x.shape[-1], self.dtype, self.out_bias, self.out_init, name="to_out_0")(h)


class AttentionBlock2D(nn.Module):
    """Residual self-attention over all pixels (DDPM, Ho et al. 2020; the autoencoder of Rombach et al. 2022).

    head_width: channels of a head. None is one head of all channels.
    groups, eps: of the norm. None groups is no norm.
    """

    head_width: int | None
    groups: int | None
    eps: float
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        b, h, w, channels = x.shape
        width = self.head_width or channels
        if channels % width:
            raise ValueError(f"attention_head_dim: {channels} channels cannot be split into heads of {width}")
        attend = Attention(channels // width, self.dtype, self.implementation, bias=True, out_init=zeros_init)
        nn.share_scope(self, attend)  # its maps are this block's own, as checkpoints have them
        normed = x if self.groups is None else GroupNorm(self.groups, self.eps, name="group_norm")(x)
        return x + attend(normed.reshape(b, h * w, channels)).reshape(x.shape)


class Activated(nn.Module):
    """x -> f(a), where a is a linear map of x, or a·f(b), where [a, b] is (Shazeer 2020).

    activation: one of ACTIVATIONS.
    """

    width: int
    activation: str = "geglu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length _"]) -> Float[Array, "batch length width"]:
        function, is_gated = ACTIVATIONS[self.activation]
        h = Dense((1 + is_gated) * self.width, self.dtype, name="proj")(x)
        if not is_gated:
            return function(h)
        value, gate = jnp.split(h, 2, axis=-1)
        return value * function(gate)


class FeedForward(nn.Module):
    """An activated map, by default a GEGLU, and a linear map back. On CPU for at most 1024 tokens at a time.

    The hidden values, by default eight times the input, then stay in the processor's cache.

    ratio: width of the activated values, in widths of the input; rounded down.
    activation: one of ACTIVATIONS.
    """

    dtype: DTypeLike = jnp.float32
    ratio: float = 4.0
    activation: str = "geglu"

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        tokens = math.prod(x.shape[:2])
        size = _largest_divisor(tokens, TOKENS)
        if backend() != "cpu" or not TOKENS // 4 <= size < tokens:
            return self._map(x)
        shared = {"variable_broadcast": ("params", "lora"), "split_rngs": {"params": False}}
        in_blocks = nn.scan(lambda self, carry, block: (carry, self._map(block)), **shared)
        _, out = in_blocks(self, None, x.reshape(-1, size, x.shape[-1]))
        return out.reshape(x.shape)

    def _map(self, x):
        h = Activated(int(self.ratio * x.shape[-1]), self.activation, self.dtype, name="net_0")(x)
        return Dense(x.shape[-1], self.dtype, name="net_2")(h)


class BasicTransformerBlock(nn.Module):
    """Pre-norm self-attention, cross-attention to the context, feed-forward, each with its residual.

    only_cross_attention: the first attention is cross-attention too.
    """

    heads: int
    only_cross_attention: bool = False
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length channels"],
        context: Float[Array, "batch keys _"] | None = None,
        mask: Bool[Array, "batch keys"] | None = None,
    ) -> Float[Array, "batch length channels"]:
        norm = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=jnp.float32)
        attend = functools.partial(Attention, self.heads, self.dtype, self.implementation)
        first_inputs = (context, mask) if self.only_cross_attention else (None, None)
        x = x + attend(name="attn1")(norm(name="norm1")(x), *first_inputs)
        x = x + attend(name="attn2")(norm(name="norm2")(x), context, mask)
        return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of an image that attend to a text (Rombach et al. 2022, section 3.3).

    heads: of every attention.
    layers: number of blocks.
    groups: of the norm before them.
    linear_projection: whether checkpoints store the input and output maps as linear maps or as 1x1 convolutions.
    remat: recompute each block in the backward pass instead of storing its activations.
    """

    heads: int
    layers: int = 1
    groups: int = 32
    linear_projection: bool = False
    only_cross_attention: bool = False
    dtype: DTypeLike = jnp.float32
    implementation: str = "auto"
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        context: Float[Array, "batch keys _"],
        mask: Bool[Array, "batch keys"] | None = None,
    ) -> Float[Array, "batch height width channels"]:
        b, height, width, channels = x.shape
        if channels % self.heads:
            raise ValueError(f"attention heads: {channels} channels cannot be split into {self.heads} heads")
        project = Dense if self.linear_projection else PointwiseConv
        h = GroupNorm(self.groups, 1e-6, name="norm")(x)
        h = project(channels, self.dtype, name="proj_in")(h).reshape(b, height * width, channels)
        make = nn.remat(BasicTransformerBlock) if self.remat else BasicTransformerBlock
        for i in range(self.layers):
            h = make(
                self.heads, self.only_cross_attention, self.dtype, self.implementation, name=f"transformer_blocks_{i}"
            )(h, context, mask)
        h = h.reshape(x.shape)
        return x + project(channels, self.dtype, init=zeros_init, name="proj_out")(h)
