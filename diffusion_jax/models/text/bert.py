"""The BERT encoder (Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers").

Field names follow config.json and layer names the state dict of transformers' `BertModel`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Embeddings(nn.Module):
    """Word + position + segment (all 0) embeddings, normalized."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        words = nn.Embed(self.vocab_size, self.hidden_size, name="word_embeddings")(ids)
        positions = nn.Embed(self.max_position_embeddings, self.hidden_size, name="position_embeddings")
        segments = nn.Embed(self.type_vocab_size, self.hidden_size, name="token_type_embeddings")
        x = words + positions(jnp.arange(ids.shape[1])) + segments(jnp.zeros_like(ids))
        return nn.LayerNorm(self.layer_norm_eps, name="LayerNorm")(x)


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in heads. Padding is masked."""

    num_attention_heads: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        heads = (*x.shape[:2], self.num_attention_heads, -1)
        query, key, value = (nn.Dense(x.shape[-1], name=name)(x).reshape(heads) for name in ("query", "key", "value"))
        return nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :]).reshape(x.shape)


class AddNorm(nn.Module):
    """LayerNorm(residual + Dense(x)), the end of both halves of a layer."""

    layer_norm_eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length hidden"], residual: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length width"]:
        x = nn.Dense(residual.shape[-1], name="dense")(x)
        return nn.LayerNorm(self.layer_norm_eps, name="LayerNorm")(residual + x)


class Attention(nn.Module):
    """The attention half of a layer."""

    num_attention_heads: int
    layer_norm_eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        attended = SelfAttention(self.num_attention_heads, name="self")(x, mask)
        return AddNorm(self.layer_norm_eps, name="output")(attended, x)


class Intermediate(nn.Module):
    """gelu(Dense(x)), the exact gelu."""

    intermediate_size: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length hidden"]:
        return nn.gelu(nn.Dense(self.intermediate_size, name="dense")(x), approximate=False)


class Layer(nn.Module):
    """One transformer layer, normalized after each half."""

    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        x = Attention(self.num_attention_heads, self.layer_norm_eps, name="attention")(x, mask)
        hidden = Intermediate(self.intermediate_size, name="intermediate")(x)
        return AddNorm(self.layer_norm_eps, name="output")(hidden, x)


class Encoder(nn.Module):
    """The stack of layers."""

    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_norm_eps: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        for i in range(self.num_hidden_layers):
            layer = Layer(self.num_attention_heads, self.intermediate_size, self.layer_norm_eps, name=f"layer_{i}")
            x = layer(x, mask)
        return x


class BertEncoder(nn.Module):
    """Token ids -> one embedding for each token, `last_hidden_state` in transformers. Defaults are MiniLM-L6-H384's."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length width"]:
        """ids: (B, L) tokens. mask: (B, L), False on padding."""
        x = Embeddings(
            self.vocab_size,
            self.hidden_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.layer_norm_eps,
            name="embeddings",
        )(ids)
        return Encoder(
            self.num_hidden_layers,
            self.num_attention_heads,
            self.intermediate_size,
            self.layer_norm_eps,
            name="encoder",
        )(x, mask)
