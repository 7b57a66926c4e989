"""The text encoder of CLIP (Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
Supervision", section 2.4): a transformer with causal attention.

Field names follow config.json and layer names the state dict of transformers' `CLIPTextModelWithProjection`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from diffusion_jax.models.layers import Dense

ACTIVATIONS = {
    "gelu": functools.partial(nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}
OLD_EOS = 2  # a mistake in the first published configs; their tokenizers end a text with the largest id


class TextFeatures(NamedTuple):
    """The features of a text that denoisers use.

    last_hidden_state: every token after all layers and the final norm (Stable Diffusion 1 and 2).
    pooled: `last_hidden_state` at the token that ends the text, projected if the encoder has a projection.
    states: every token before the first layer and after each, not normalized.
    """

    last_hidden_state: Float[Array, "batch length width"]
    pooled: Float[Array, "batch features"]
    states: tuple[Float[Array, "batch length width"], ...]

    @property
    def penultimate(self) -> Float[Array, "batch length width"]:
        """Every token before the last layer, not normalized (both encoders of Stable Diffusion XL)."""
        return self.states[-2]


class Embeddings(nn.Module):
    """Token + position."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        length = ids.shape[1]
        if length > self.max_position_embeddings:
            raise ValueError(f"this text encoder reads at most {self.max_position_embeddings} tokens, got {length}")
        tokens = nn.Embed(self.vocab_size, self.hidden_size, name="token_embedding")
        positions = nn.Embed(self.max_position_embeddings, self.hidden_size, name="position_embedding")
        return tokens(ids) + positions(jnp.arange(length))


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v in heads, the softmax in float32.

    causal: a token attends only to itself and earlier tokens.
    """

    heads: int
    dtype: DTypeLike = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        width = x.shape[-1]
        if width % self.heads:
            raise ValueError(f"num_attention_heads: hidden_size {width} cannot be split into {self.heads} heads")
        heads = (*x.shape[:2], self.heads, width // self.heads)
        q, k, v = (Dense(width, self.dtype, name=f"{name}_proj")(x).reshape(heads) for name in "qkv")
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=self.causal)
        return Dense(width, self.dtype, name="out_proj")(attended.reshape(x.shape))


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    width: int
    activation: str
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch length channels"]:
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"hidden_act: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        h = ACTIVATIONS[self.activation](Dense(self.width, self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], self.dtype, name="fc2")(h)


class EncoderLayer(nn.Module):
    """Self-attention and a multi-layer perceptron, each after a norm and with its residual."""

    heads: int
    intermediate_size: int
    activation: str
    eps: float
    dtype: DTypeLike = jnp.float32
    causal: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        norm = functools.partial(nn.LayerNorm, self.eps, dtype=jnp.float32)
        x = x + SelfAttention(self.heads, self.dtype, self.causal, name="self_attn")(norm(name="layer_norm1")(x))
        return x + MLP(self.intermediate_size, self.activation, self.dtype, name="mlp")(norm(name="layer_norm2")(x))


class Encoder(nn.Module):
    """A stack of layers. Returns its output, and its input with the output of each layer."""

    layer: Callable[..., nn.Module]
    count: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"]
    ) -> tuple[Float[Array, "batch length width"], tuple[Float[Array, "batch length width"], ...]]:
        states = [x]
        for i in range(self.count):
            states.append(self.layer(name=f"layers_{i}")(states[-1]))
        return states[-1], tuple(states)


def stack(fields: nn.Module, dtype: DTypeLike, causal: bool) -> Callable[..., Encoder]:
    """The layers of an encoder, whose fields have the names of transformers' configs."""
    layer = functools.partial(
        EncoderLayer,
        fields.num_attention_heads,
        fields.intermediate_size,
        fields.hidden_act,
        fields.layer_norm_eps,
        dtype,
        causal,
    )
    return functools.partial(Encoder, layer, fields.num_hidden_layers)


class TextTransformer(nn.Module):
    """Embeddings, layers, final norm. Returns the normalized tokens, and those before and after each layer."""

    embeddings: Callable[..., nn.Module]
    encoder: Callable[..., nn.Module]
    eps: float

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"]
    ) -> tuple[Float[Array, "batch length width"], tuple[Float[Array, "batch length width"], ...]]:
        x, states = self.encoder(name="encoder")(self.embeddings(name="embeddings")(ids))
        return nn.LayerNorm(self.eps, dtype=jnp.float32, name="final_layer_norm")(x), states


class ClipTextEncoder(nn.Module):
    """Token ids -> an embedding for each token and one for the text. Defaults are those of transformers' config.

    projection_dim: P, size of the projected embedding of the text. None for an encoder without a projection
      (`CLIPTextModel`; its config.json may still have a number, which is unused).
    hidden_act: "quick_gelu" (OpenAI's weights) or "gelu" (OpenCLIP's).
    eos_token_id: the token that ends a text. 2 means the largest id of the text, as in the first published configs.
    dtype: of the large multiplications. Parameters, norms, softmax and results are float32.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "batch length"]) -> TextFeatures:
        """ids: (B, L) tokens, with the end token in every row. Raises ValueError for too large an L."""
        embeddings = functools.partial(Embeddings, self.vocab_size, self.hidden_size, self.max_position_embeddings)
        encoder = stack(self, self.dtype, causal=True)
        tokens, states = TextTransformer(embeddings, encoder, self.layer_norm_eps, name="text_model")(ids)

        ends = ids if self.eos_token_id == OLD_EOS else ids == self.eos_token_id
        pooled = tokens[jnp.arange(len(ids)), jnp.argmax(ends, axis=1)]
        if self.projection_dim is not None:
            pooled = Dense(self.projection_dim, use_bias=False, name="text_projection")(pooled)
        return TextFeatures(tokens, pooled, states)

    def cut(self, skipped: int, norm: bool) -> "ClipTextEncoder":
        """The encoder itself: the embedding of the text comes after all layers."""
        return self

    def example_inputs(self) -> tuple[Int[Array, "1 1"]]:
        """The smallest valid arguments of `init`."""
        return (jnp.zeros((1, 1), jnp.int32),)
