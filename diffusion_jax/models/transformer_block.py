"""The block of `models.transformer`, and what it reads."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from diffusion_jax.models.attention import Attention, FeedForward
from diffusion_jax.models.layers import dropout, zeros_init
from diffusion_jax.models.token_layers import EmbeddedModulation, Modulation, Rotation, modulated, token_norm

FINAL_EPS = 1e-6  # of the norms before attention and at the end of a transformer


class Inputs(NamedTuple):
    """What every block reads besides its tokens.

    condition: (t, cond) for modulation="own", the embedding (B, width) for "block", the six vectors for "shared".
    turn: the rotary positions of the tokens.
    mask: the tokens that may be attended to.
    text, text_mask: for text="cross".
    keys: (B,), one for each image. They turn dropout on.
    """

    condition: Any
    turn: Rotation | None = None
    mask: Bool[Array, "batch length"] | None = None
    text: Float[Array, "batch keys _"] | None = None
    text_mask: Bool[Array, "batch keys"] | None = None
    keys: Key[Array, "batch"] | None = None


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to a text, MLP, each with its residual.

        x += gate1 · attn1(norm(x) (1 + scale1) + shift1)
        x += attn2(norm(x), text)                           with a text
        x += gate2 · ff(norm(x) (1 + scale2) + shift2)

    embedding: for modulation="own", function from name to the embedding of the condition.
    Other fields as of `Transformer`. A new block passes its input through.
    """

    heads: int
    modulation: str
    embedding: Any
    norm: str
    affine: bool
    eps: float
    qk_norm: str | None
    pairs: str
    bias: bool
    activation: str
    ratio: float
    dropout: float
    dtype: DTypeLike
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch length width"], layer: int | Array, inputs: Inputs
    ) -> tuple[Float[Array, "batch length width"], Float[Array, "batch width"] | None]:
        """The tokens, and for modulation="own" the embedding of the condition. layer: number of the block."""
        vectors, c = self._vectors(inputs.condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors
        attend = functools.partial(Attention, self.heads, self.dtype, self.implementation, self.bias)
        qk_norm = self.qk_norm and token_norm(self.qk_norm, self.eps, affine=True)
        norm = functools.partial(token_norm, self.norm, affine=self.affine)
        drop = functools.partial(self._drop, layer, inputs.keys)

        h = modulated(norm(FINAL_EPS)(name="attention_norm")(x), shift1, scale1)
        h = attend(qk_norm=qk_norm, pairs=self.pairs, name="attn1")(h, None, inputs.mask, inputs.turn)
        x = x + (gate1 * drop(h, 1)).astype(x.dtype)
        if inputs.text is not None:
            h = norm(self.eps)(name="text_norm")(x)
            h = attend(out_init=zeros_init, name="attn2")(h, inputs.text, inputs.text_mask)
            x = x + drop(h, 2)
        h = modulated(norm(self.eps)(name="ffn_norm")(x), shift2, scale2)
        h = FeedForward(self.dtype, self.ratio, self.activation, name="ff")(h)
        return x + (gate2 * drop(h, 3)).astype(x.dtype), c

    def _vectors(self, condition):
        if self.modulation == "own":
            return EmbeddedModulation(6, self.embedding, name="norm1")(*condition)
        return condition if self.modulation == "shared" else Modulation(6, name="norm1")(condition), None

    def _drop(self, layer, keys, x, branch):
        if keys is None or not self.dropout:
            return x
        return dropout(x, self.dropout, jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys), branch)
