"""FLUX.2 klein: prompts in Qwen3's chat form, a transformer of flow on the latents of FLUX.2's autoencoder."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.data.references import References
from diffusion_jax.interop.components import AUTOENCODER, TOKENS, TRANSFORMER
from diffusion_jax.interop.families import chat, flux2_names, sizes
from diffusion_jax.interop.family import Config, Family
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.flux2 import Flux2Transformer


def _latent_inputs(transformer: Flux2Transformer) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"x": (1, 4, 6, transformer.in_channels), "text": (1, TOKENS, transformer.joint_attention_dim)}
    return {"t": jnp.array([500.0])} | {
        name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()
    }


def _run_transformer(model: Any, inputs: Mapping[str, Any]) -> None:
    import torch

    x, text = inputs["x"], inputs["text"]
    rows, columns = map(torch.arange, x.shape[2:])
    zero, words = torch.arange(1), torch.arange(text.shape[1])
    model(
        x.flatten(2).transpose(1, 2),
        encoder_hidden_states=text,
        timestep=inputs["t"] / 1000,
        img_ids=torch.cartesian_prod(zero, rows, columns, zero),
        txt_ids=torch.cartesian_prod(zero, zero, zero, words),
    )


def _levels(cells: int, steps: int) -> Config:
    """Even levels, and the shift of `compute_empirical_mu` of diffusers: a line in the steps through those of 10 and of
    200 steps, each a line in the size of the image; that of 200 for large images.
    """
    mu_10, mu_200 = 8.73809524e-05 * cells + 1.89833333, 0.00016927 * cells + 0.45666666
    mu = mu_200 if cells > 4300 else mu_200 + (mu_200 - mu_10) / 190 * (steps - 200)
    return {"mu": mu, "sigmas": np.linspace(1, 1 / steps, steps)}


def _fits(transformer: Flux2Transformer, autoencoder: AutoencoderKL) -> str:
    if transformer.in_channels == autoencoder.channels == (transformer.out_channels or transformer.in_channels):
        return ""
    return (
        f"expected a transformer of {autoencoder.channels} input and output channels, those of the autoencoder, got "
        f"{transformer.in_channels} and {transformer.out_channels or transformer.in_channels}"
    )


FAMILY = Family(
    name="FLUX.2 klein",
    licence="Apache 2.0 (4B), FLUX Non-Commercial License (9B)",
    source="black-forest-labs/flux2",
    recognises=lambda index, configs: index.get("_class_name") == "Flux2KleinPipeline",
    parts={
        "text_encoder": chat.reader(states=(9, 18, 27)),
        "transformer": TRANSFORMER._replace(inputs=_latent_inputs, run=_run_transformer),
        "vae": AUTOENCODER,
    },
    denoiser="transformer",
    autoencoder="vae",
    tokenizers={"text_encoder": "tokenizer"},
    prompt=chat.prompt(answer="<think>\n\n</think>\n\n", masked=False),  # without thoughts
    index=lambda transformer: {"_class_name": "Flux2KleinPipeline"},
    fits=_fits,
    is_flow=True,
    levels=_levels,
    # four are the most of docs.bfl.ai (image editing); the sizes are those of `Flux2ImageProcessor` of diffusers
    references=References(most=4, area=1024 * 1024, side=64, ratio=8),
    names=flux2_names.NAMES,
    sizes_of=flux2_names.sizes_of,
    has_guidance=lambda index, scheduler: index.get("is_distilled", False) is True,
    sizes={"klein": sizes.KLEIN_4B},
)
