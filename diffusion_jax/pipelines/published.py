"""Published models of the Stable Diffusion family as pipelines of this library."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from diffusion_jax.core import process
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.models.text import tokenize
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines.codec import autoencoder_kl
from diffusion_jax.pipelines.pipeline import Pipeline


def from_published(published: PublishedPipeline) -> tuple[Pipeline, Callable[[Sequence[str]], PyTree]]:
    """A pipeline and what makes its conditions of prompts. The schedule for plans is `published.schedule`.

    Conditions are {"text": (B, L, D)}, the last layer of the text encoder (SD 1 and 2); of SDXL (Podell et al. 2023)
    the layers before the last ones, side by side, with {"text_embeds": (B, P), "time_ids": (B, 6)}, the vector of the
    whole prompt and the sizes of an image that was neither scaled nor cropped. No condition is the empty prompt, or
    zeros where the model's authors say so.
    Raises ValueError for a model without tokenizers, and for one that also needs an image or an aesthetic score.
    """
    unet, autoencoder = published.unet, published.autoencoder
    if len(published.tokenizers) != len(published.text_encoders) or not published.tokenizers:
        raise ValueError(
            f"expected a tokenizer for each of {len(published.text_encoders)} text encoders, got "
            f"{len(published.tokenizers)}; name a folder that has them as `tokenizers` of load_pipeline"
        )
    if unet.module.in_channels != unet.module.out_channels or published.text_names == ("text_encoder_2",):
        raise ValueError("text to image needs a model that sees the noisy latents and a prompt, and nothing else")
    codec = autoencoder_kl(*autoencoder)
    size = unet.module.sample_size * codec.factor
    wide = unet.module.addition_embed_type is not None
    encoders = [jax.jit(part.module.apply) for part in published.text_encoders]

    def embed(prompts: Sequence[str]) -> PyTree:
        features = []
        for apply, part, tokenizer in zip(encoders, published.text_encoders, published.tokenizers, strict=True):
            ids, _ = tokenize(prompts, tokenizer, tokenizer.padding["length"])
            features.append(apply(part.params, jnp.asarray(ids)))
        if not wide:
            return {"text": features[0].last_hidden_state}
        return {
            "text": jnp.concatenate([feature.penultimate for feature in features], axis=-1),
            "text_embeds": features[-1].pooled,
            "time_ids": jnp.tile(jnp.float32([size, size, 0, 0, size, size]), (len(prompts), 1)),
        }

    null = jax.tree.map(lambda leaf: leaf[0], embed([""]))
    if wide and published.index.get("force_zeros_for_empty_prompt", True):
        null |= {name: jnp.zeros_like(null[name]) for name in ("text", "text_embeds")}
    pipeline = Pipeline(
        apply=_Denoiser(unet.module),
        params=unet.params,
        convert=process.CONVERSIONS[published.prediction],
        codec=codec,
        null_cond=null,
        size=size,
    )
    return pipeline, embed


@dataclass(frozen=True)
class _Denoiser:
    """A U-Net as apply(params, x, t, cond); equal for equal networks."""

    unet: UNet

    def __call__(self, params: PyTree, x: Array, t: Array, cond: PyTree) -> Array:
        others = {name: leaf for name, leaf in cond.items() if name != "text"}
        return self.unet.apply(params, x, t, cond["text"], **others)
