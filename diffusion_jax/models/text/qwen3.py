"""Qwen3 (Yang et al. 2025, "Qwen3 Technical Report"), a language model read for the states of its tokens.

Field names follow config.json and layer names the state dict of transformers' `Qwen3Model`.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from diffusion_jax.models.layers import Dense
from diffusion_jax.models.token_layers import GatedFeedForward, Rotation, rotate, rotation, token_norm


class SelfAttention(nn.Module):
    """Causal attention in heads, the softmax in float32. Padding is masked. Groups of heads share one key and value.

    Each head of q and of k is normalized, then rotated by the position of its token. Fields as of `Qwen3Encoder`.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    attention_bias: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"], turn: Rotation
    ) -> Float[Array, "batch length width"]:
        project = functools.partial(Dense, dtype=self.dtype, use_bias=self.attention_bias)
        heads = {"q": self.num_attention_heads, "k": self.num_key_value_heads, "v": self.num_key_value_heads}
        q, k, v = (
            project(count * self.head_dim, name=f"{name}_proj")(x).reshape(*x.shape[:2], count, self.head_dim)
            for name, count in heads.items()
        )
        norm = token_norm("rms_norm", self.rms_norm_eps, affine=True)
        q, k = (rotate(norm(name=f"{n}_norm")(h), turn, "half").astype(v.dtype) for n, h in (("q", q), ("k", k)))
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :], is_causal=True)
        return project(x.shape[-1], name="o_proj")(attended.reshape(*x.shape[:2], -1))


class Layer(nn.Module):
    """Attention, then feed-forward, each of the normalized tokens and with its residual in float32."""

    attention: Callable[..., SelfAttention]
    feed_forward: Callable[..., GatedFeedForward]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], mask: Bool[Array, "batch length"], turn: Rotation
    ) -> Float[Array, "batch length width"]:
        x = x + self.attention(name="self_attn")(self.norm(name="input_layernorm")(x), mask, turn)
        return x + self.feed_forward(name="mlp")(self.norm(name="post_attention_layernorm")(x))


class Qwen3Encoder(nn.Module):
    """Token ids -> an embedding for each token. Defaults are those of Qwen3-4B.

    num_attention_heads, num_key_value_heads: heads of q, and of k and v. The first is a multiple of the second.
    head_dim: width of a head. num_attention_heads · head_dim may differ from hidden_size.
    outputs: the states that are returned, joined on channels: state i is that after i layers, not normalized. Layers
      after the last of them are left out. None is the state after all layers, normalized.
    dtype: of the large multiplications. Parameters, residual sums, norms, softmax and results are float32.
    """

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    attention_bias: bool = False
    hidden_act: str = "silu"
    outputs: tuple[int, ...] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "batch length"], mask: Bool[Array, "batch length"]
    ) -> Float[Array, "batch length channels"]:
        """ids: (B, L) tokens. mask: (B, L), False on padding, whose embeddings depend on the text before it."""
        self._check_fields()
        norm = token_norm("rms_norm", self.rms_norm_eps, affine=True)
        attend = functools.partial(
            SelfAttention,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
            self.rms_norm_eps,
            self.attention_bias,
            self.dtype,
        )
        turn = rotation(np.arange(ids.shape[1], dtype=np.float64)[:, None], (self.head_dim,), self.rope_theta)
        maps = ("gate_proj", "up_proj", "down_proj")
        feed_forward = functools.partial(GatedFeedForward, self.intermediate_size, maps, self.dtype)
        layer = functools.partial(Layer, attend, feed_forward, norm)
        states = [nn.Embed(self.vocab_size, self.hidden_size, name="embed_tokens")(ids).astype(jnp.float32)]
        for i in range(self.num_hidden_layers if self.outputs is None else max(self.outputs)):
            states.append(layer(name=f"layers_{i}")(states[-1], mask, turn))
        if self.outputs is None:
            return norm(name="norm")(states[-1])
        return jnp.concatenate([states[i] for i in self.outputs], axis=-1)

    def cut(self, skipped: int, norm: bool) -> "Qwen3Encoder":
        """The encoder without its last layers. norm: whether the final norm follows the others."""
        layers = self.num_hidden_layers - skipped
        return self.clone(num_hidden_layers=layers, outputs=None if norm else (layers,))

    def example_inputs(self) -> tuple[Int[Array, "1 1"], Bool[Array, "1 1"]]:
        """The smallest valid arguments of `init`."""
        return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)

    def _check_fields(self) -> None:
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {self.hidden_act!r}")
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads = {self.num_key_value_heads}, got "
                f"{self.num_attention_heads}"
            )
        if self.outputs is not None and not all(0 <= i <= self.num_hidden_layers for i in self.outputs):
            raise ValueError(f"outputs: expected states from 0 to {self.num_hidden_layers}, got {self.outputs}")
