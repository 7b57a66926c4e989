"""The BERT encoder (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers").

Field names follow config.json and layer names the state dict of transformers' `BertModel`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.models.layers import kernel_init

Dense = functools.partial(nn.Dense, kernel_init=kernel_init)
Embed = functools.partial(nn.Embed, embedding_init=kernel_init)


class Embeddings(nn.Module):
    """Word + position + segment (all 0) embeddings, normalized."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        length = ids.shape[1]
        if length > self.max_position_embeddings:
            raise ValueError(f"this text encoder reads at most {self.max_position_embeddings} tokens, got {length}")
        words = Embed(self.vocab_size, self.hidden_size, name="word_embeddings")(ids)
        positions = Embed(self.max_position_embeddings, self.hidden_size, name="position_embeddings")
        segments = Embed(self.type_vocab_size, self.hidden_size, name="token_type_embeddings")
        x = words + positions(jnp.arange(length)) + segments(jnp.zeros_like(ids))
        return nn.LayerNorm(self.layer_norm_eps, dtype=jnp.float32, name="LayerNorm")(x)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in heads, the softmax in float32. Padding is masked."""

    num_attention_heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        heads = (*x.shape[:2], self.num_attention_heads, -1)
        project = functools.partial(Dense, x.shape[-1], dtype=self.dtype)
        query, key, value = (project(name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        mask = mask[:, None, None, :]
        attended = nn.dot_product_attention(query, key, value, mask=mask, force_fp32_for_softmax=True)
        return attended.reshape(x.shape)


class AddNorm(nn.Module):
    """LayerNorm(residual + Dense(x)), the end of both halves of a layer."""

    layer_norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length hidden"], residual: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        x = Dense(residual.shape[-1], dtype=self.dtype, name="dense")(x)
        return nn.LayerNorm(self.layer_norm_eps, dtype=jnp.float32, name="LayerNorm")(residual + x)


class Attention(nn.Module):
    """The attention half of a layer."""

    num_attention_heads: int
    layer_norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        attended = SelfAttention(self.num_attention_heads, self.dtype, name="self")(x, mask)
        return AddNorm(self.layer_norm_eps, self.dtype, name="output")(attended, x)


class Intermediate(nn.Module):
    """gelu(Dense(x)), the exact gelu."""

    intermediate_size: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length hidden"]:
        return nn.gelu(Dense(self.intermediate_size, dtype=self.dtype, name="dense")(x), approximate=False)


class Layer(nn.Module):
    """One transformer layer, normalized after each half."""

    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        x = Attention(self.num_attention_heads, self.layer_norm_eps, self.dtype, name="attention")(x, mask)
        hidden = Intermediate(self.intermediate_size, self.dtype, name="intermediate")(x)
        return AddNorm(self.layer_norm_eps, self.dtype, name="output")(hidden, x)


class Encoder(nn.Module):
    """The stack of layers."""

    layer: Callable[..., Layer]
    count: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        for i in range(self.count):
            x = self.layer(name=f"layer_{i}")(x, mask)
        return x


class BertEncoder(nn.Module):
    """Token ids -> one embedding for each token, `last_hidden_state` in transformers. Defaults are BERT base's.

    dtype: of the large multiplications. Parameters, norms, softmax and results are float32.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """ids: (B, L) tokens. mask: (B, L), False on padding. Raises ValueError for too large an L."""
        if self.hidden_act != "gelu":
            raise ValueError(f"hidden_act: expected 'gelu', got {self.hidden_act!r}")
        x = Embeddings(
            self.vocab_size,
            self.hidden_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.layer_norm_eps,
            name="embeddings",
        )(ids)
        layer = functools.partial(
            Layer, self.num_attention_heads, self.intermediate_size, self.layer_norm_eps, self.dtype
        )
        return Encoder(layer, self.num_hidden_layers, name="encoder")(x, mask)

    def cut(self, skipped: int, norm: bool) -> "BertEncoder":
        """The encoder without its last layers. norm: not used, as there is no final norm."""
        return self.clone(num_hidden_layers=self.num_hidden_layers - skipped)

    def example_inputs(self) -> tuple[Int[Array, "1 1"], Bool[Array, "1 1"]]:
        """The smallest valid arguments of `init`."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
