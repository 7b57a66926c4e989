"""The encoder of T5 (Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer"), that of v1.1 with the gated feed-forward of Shazeer 2020.

Field names follow config.json and layer names the state dict of transformers' `T5EncoderModel`.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.models.layers import Dense


def position_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "length length"]:
    """Bucket of each pair (query i, key j) of a sequence, section 2.1 of the paper.

    One half of the buckets is for keys after the query. In each half n = buckets / 2, the distance d = |j - i| has

        d                                                         for d < n/2
        n/2 + floor(n/2 · log(d / (n/2)) / log(max_distance / (n/2)))   beyond, at most n - 1

    Computed in float32 as in the published networks, because rounding decides at the borders.
    """
    offset = np.arange(length) - np.arange(length)[:, None]
    half, distance = buckets // 2, np.abs(offset)
    exact = half // 2
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    spread = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + spread.astype(int), half - 1)
    return np.where(distance < exact, distance, far) + half * (offset > 0)


class SelfAttention(nn.Module):
    """softmax(q k^T + b) v in heads, without a scale, the softmax in float32. Padding is masked.

    The first layer computes the bias b from the positions and passes it to all others.
    """

    heads: int
    head_width: int
    buckets: int
    max_distance: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
        bias: Float[Array, "1 heads length length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "1 heads length length"]]:
        if bias is None:
            table = nn.Embed(self.buckets, self.heads, name="relative_attention_bias")
            positions = position_buckets(x.shape[1], self.buckets, self.max_distance)
            bias = table(jnp.asarray(positions)).transpose(2, 0, 1)[None]
        project = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        heads = (*x.shape[:2], self.heads, self.head_width)
        q, k, v = (project(self.heads * self.head_width, name=name)(x).reshape(heads) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, bias, mask[:, None, None, :], scale=1.0)
        return project(x.shape[-1], name="o")(attended.reshape(*x.shape[:2], -1)), bias


class FeedForward(nn.Module):
    """wo(gelu(wi_0 x) · wi_1 x), with the tanh approximation of gelu, or wo(relu(wi x)) if it is not gated."""

    width: int
    gated: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        project = functools.partial(Dense, dtype=self.dtype, use_bias=False)
        if self.gated:
            gate, value = (project(self.width, name=name)(x) for name in ("wi_0", "wi_1"))
            hidden = nn.gelu(gate, approximate=True) * value
        else:
            hidden = nn.relu(project(self.width, name="wi")(x))
        return project(x.shape[-1], name="wo")(hidden)


def rms_norm(eps: float, name: str) -> nn.RMSNorm:
    """x / sqrt(mean(x^2) + eps) · scale (Zhang & Sennrich 2019), in float32."""
    return nn.RMSNorm(eps, dtype=jnp.float32, name=name)


class AttentionLayer(nn.Module):
    """The attention half of a block. Returns its residual sum and the bias for the next block."""

    attention: Callable[..., SelfAttention]
    eps: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
        bias: Float[Array, "1 heads length length"] | None,
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "1 heads length length"]]:
        h, bias = self.attention(name="SelfAttention")(rms_norm(self.eps, "layer_norm")(x), mask, bias)
        return x + h, bias


class FeedForwardLayer(nn.Module):
    """The feed-forward half of a block with its residual."""

    width: int
    gated: bool
    eps: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        normed = rms_norm(self.eps, "layer_norm")(x)
        return x + FeedForward(self.width, self.gated, self.dtype, name="DenseReluDense")(normed)


class Block(nn.Module):
    """Attention, then feed-forward."""

    attention: Callable[..., AttentionLayer]
    feed_forward: Callable[..., FeedForwardLayer]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        mask: Bool[Array, "batch length"],
        bias: Float[Array, "1 heads length length"] | None,
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "1 heads length length"]]:
        x, bias = self.attention(name="layer_0")(x, mask, bias)
        return self.feed_forward(name="layer_1")(x), bias


class Stack(nn.Module):
    """The blocks and the final norm, if any. All blocks share the bias of the first one, or each has its own."""

    block: Callable[..., Block]
    count: int
    eps: float
    own_biases: bool
    final_norm: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        bias = None
        for i in range(self.count):
            x, bias = self.block(name=f"block_{i}")(x, mask, None if self.own_biases else bias)
        return rms_norm(self.eps, "final_layer_norm")(x) if self.final_norm else x


class T5Encoder(nn.Module):
    """Token ids -> one embedding for each token, `last_hidden_state` in transformers. Defaults are T5 v1.1 XXL's.

    d_kv: width of a head. num_heads · d_kv may differ from d_model.
    feed_forward_proj: "gated-gelu", as in v1.1 and later, or "relu", as before. Raises ValueError for another.
    own_biases: each layer has relative positions of its own (UMT5, Chung et al. 2023).
    final_norm: whether the result is normalized.
    dtype: of the large multiplications. Parameters, norms, softmax and results are float32. Activations overflow
      float16, but not bfloat16.
    """

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    own_biases: bool = False
    final_norm: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """ids: (B, L) tokens. mask: (B, L), False on padding."""
        if self.feed_forward_proj not in ("gated-gelu", "relu"):
            raise ValueError(f"feed_forward_proj: expected 'gated-gelu' or 'relu', got {self.feed_forward_proj!r}")
        gated = self.feed_forward_proj == "gated-gelu"
        eps = self.layer_norm_epsilon
        attention = functools.partial(
            SelfAttention,
            self.num_heads,
            self.d_kv,
            self.relative_attention_num_buckets,
            self.relative_attention_max_distance,
            self.dtype,
        )
        block = functools.partial(
            Block,
            functools.partial(AttentionLayer, attention, eps),
            functools.partial(FeedForwardLayer, self.d_ff, gated, eps, self.dtype),
        )
        x = nn.Embed(self.vocab_size, self.d_model, name="shared")(ids)
        return Stack(block, self.num_layers, eps, self.own_biases, self.final_norm, name="encoder")(x, mask)

    def cut(self, skipped: int, norm: bool) -> "T5Encoder":
        """The encoder without its last layers. norm: whether the final norm follows the others."""
        return self.clone(num_layers=self.num_layers - skipped, final_norm=norm)

    def example_inputs(self) -> tuple[Int[Array, "1 1"], Bool[Array, "1 1"]]:
        """The smallest valid arguments of `init`."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
