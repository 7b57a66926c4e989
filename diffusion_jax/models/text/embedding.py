"""What a denoiser reads of a text encoder: the tokens after one of its layers, and one vector for the whole text."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from diffusion_jax.models.text.bert import BertEncoder
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.text.encoder import TextEmbedding
from diffusion_jax.models.text.qwen3 import Qwen3Encoder
from diffusion_jax.models.text.t5 import T5Encoder

Encoder = ClipTextEncoder | T5Encoder | BertEncoder | Qwen3Encoder


def embedding(module: Encoder, skipped: int, norm: bool) -> Callable:
    """(params, ids (B, L), mask (B, L)) -> TextEmbedding, a pure function. params: those of `module.cut` suffice.

    The vector of CLIP is that of its end token after all layers, of the others it is `mean_of_tokens`.
    skipped: how many layers come after the one whose tokens are used.
    norm: whether the final norm follows that layer. BERT has none.
    """
    if isinstance(module, ClipTextEncoder):
        return functools.partial(_of_clip, module, skipped, norm)
    return functools.partial(_of_tokens, module.cut(skipped, norm))


def _of_clip(
    module: ClipTextEncoder,
    skipped: int,
    norm: bool,
    params: PyTree,
    ids: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> TextEmbedding:
    features = module.apply(params, ids)
    tokens = features.states[-1 - skipped].astype(jnp.float32)
    if norm:
        final_norm = {"params": params["params"]["text_model"]["final_layer_norm"]}
        tokens = nn.LayerNorm(module.layer_norm_eps, dtype=jnp.float32).apply(final_norm, tokens)
    return TextEmbedding(tokens, features.pooled.astype(jnp.float32))


def _of_tokens(
    module: T5Encoder | BertEncoder | Qwen3Encoder,
    params: PyTree,
    ids: Int[Array, "batch length"],
    mask: Bool[Array, "batch length"],
) -> TextEmbedding:
    tokens = module.apply(params, ids, mask).astype(jnp.float32)
    return TextEmbedding(tokens, mean_of_tokens(tokens, mask))


def mean_of_tokens(
    tokens: Float[Array, "batch length width"], mask: Bool[Array, "batch length"]
) -> Float[Array, "batch width"]:
    """One vector for each text: the mean of its tokens without padding, scaled to values of mean square 1."""
    total = jnp.sum(tokens, axis=1, where=mask[..., None])
    return total / jnp.sqrt(jnp.mean(total**2, axis=-1, keepdims=True)).clip(1e-6)
