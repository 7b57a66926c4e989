"""Published models of the Stable Diffusion family as pipelines of this library."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax.core import process, solvers
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.models.denoiser import Denoiser
from diffusion_jax.models.text import tokenize
from diffusion_jax.pipelines import prompts as weighted
from diffusion_jax.pipelines.codec import autoencoder_kl, fingerprint
from diffusion_jax.pipelines.conditioning import Conditioning
from diffusion_jax.pipelines.pipeline import Pipeline

PROMPT_BATCH = 16  # prompts that the text encoders read at once


def from_published(
    published: PublishedPipeline,
    size: tuple[int, int] | None = None,
    dtype: DTypeLike = jnp.float32,
    tile: int = 0,
) -> tuple[Pipeline, Conditioning]:
    """A pipeline and what makes its conditions of prompts. The schedule for plans is `published.schedule`.

    Conditions are {"text": (B, L, D)}, the last layer of the text encoder (SD 1 and 2); of SDXL (Podell et al. 2023)
    the layers before the last ones, side by side, with {"text_embeds": (B, P), "time_ids": (B, 6)}, the vector of the
    whole prompt and the sizes of an image that was neither scaled nor cropped. Prompts may be weighted and of any
    length (`pipelines.prompts`), captions of records are cut to one chunk. No condition is the empty prompt, or zeros
    where the model's authors say so.
    size: height and width of the images in pixels, the model's own by default. dtype: that networks compute in.
    tile: see `codec.autoencoder_kl`.
    Raises ValueError for a size that the autoencoder cannot make, for a model without tokenizers, and for one that also
    needs an aesthetic score.
    """
    module = published.unet.module.clone(dtype=dtype)
    _check(published)
    autoencoder = published.autoencoder
    codec = autoencoder_kl(autoencoder.module.clone(dtype=dtype), autoencoder.params, tile)
    size = size or (module.sample_size * codec.factor,) * 2
    if any(pixels < codec.factor or pixels % codec.factor for pixels in size):
        raise ValueError(f"height and width must be multiples of {codec.factor} pixels, got {size[0]} and {size[1]}")
    conditioning = _conditioning(published, size, dtype)
    pipeline = Pipeline(
        apply=Denoiser(module),
        params=published.unet.params,
        convert=process.CONVERSIONS[published.prediction],
        codec=codec,
        null_cond=conditioning.null,
        size=size,
        fills=module.in_channels > module.out_channels,
    )
    return pipeline, conditioning


def published_times(published: PublishedPipeline, steps: int) -> np.ndarray:
    """The times at which the model's authors let a solver of `steps` steps evaluate it: (steps,), falling.

    Raises ValueError for steps outside 1..T, and for so many that the authors' offset leaves the schedule.
    """
    spacing = published.scheduler.get("timestep_spacing", "leading")
    times = solvers.times(published.schedule, steps, spacing)
    offset = published.scheduler.get("steps_offset", 0) if spacing == "leading" else 0
    return np.minimum(times + offset, published.schedule.t_max)


def _check(published: PublishedPipeline) -> None:
    if len(published.tokenizers) != len(published.text_encoders) or not published.tokenizers:
        raise ValueError(
            f"expected a tokenizer for each of {len(published.text_encoders)} text encoders, got "
            f"{len(published.tokenizers)}; name a folder that has them as `tokenizers` of load_pipeline"
        )
    unet, channels = published.unet.module, published.autoencoder.module.latent_channels
    if unet.in_channels not in (channels, 2 * channels + 1) or published.text_names == ("text_encoder_2",):
        raise ValueError(
            "expected a model that sees the noisy latents and a prompt, and of inpainting a mask and the known latents"
        )


def _conditioning(published: PublishedPipeline, size: tuple[int, int], dtype: DTypeLike) -> Conditioning:
    wide = published.unet.module.addition_embed_type is not None
    encoders = [jax.jit(part.module.clone(dtype=dtype).apply) for part in published.text_encoders]
    parts = list(zip(encoders, published.text_encoders, published.tokenizers, strict=True))

    def encoded(ids: Sequence[np.ndarray], weights: np.ndarray) -> PyTree:
        """ids: of each text encoder, (B, chunks, L). weights: (B, chunks, L)."""
        layers, pooled = [], None
        for (apply, part, _), own in zip(parts, ids, strict=True):
            features = apply(part.params, jnp.asarray(own.reshape(-1, own.shape[-1])))
            z = features.penultimate if wide else features.last_hidden_state
            layers.append(weighted.emphasise(z.astype(jnp.float32), weights))
            pooled = features.pooled
        if not wide:
            return {"text": layers[0]}
        height, width = size
        return {
            "text": jnp.concatenate(layers, axis=-1),
            "text_embeds": pooled.reshape(*weights.shape[:2], -1)[:, 0].astype(jnp.float32),
            "time_ids": jnp.tile(jnp.float32([height, width, 0, 0, height, width]), (len(weights), 1)),
        }

    def in_batches(ids: list, weights: np.ndarray) -> PyTree:
        starts = range(0, len(weights), PROMPT_BATCH)
        made = [encoded([own[i : i + PROMPT_BATCH] for own in ids], weights[i : i + PROMPT_BATCH]) for i in starts]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *made)

    def of_prompts(prompts: Sequence[str]) -> PyTree:
        ids, weights = zip(*(weighted.chunked(prompts, tokenizer) for *_, tokenizer in parts), strict=True)
        return in_batches(list(ids), weights[0])

    def of_captions(captions: Sequence[str]) -> PyTree:
        ids = [tokenize(captions, tokenizer, tokenizer.padding["length"])[0][:, None] for *_, tokenizer in parts]
        return in_batches(ids, np.ones(ids[0].shape, np.float32))

    null = jax.tree.map(lambda leaf: leaf[0], of_captions([""]))
    if wide and published.index.get("force_zeros_for_empty_prompt", True):
        null |= {name: np.zeros_like(null[name]) for name in ("text", "text_embeds")}
    return Conditioning(
        name=fingerprint([part.params for part in published.text_encoders]),
        of_records=lambda records: of_captions(list(records["caption"])),
        of_prompts=of_prompts,
        null=null,
    )
