"""Stable Diffusion XL, and its refiner."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.interop.components import AUTOENCODER, TEXT_ENCODER, UNET
from diffusion_jax.interop.families import latent_diffusion, sizes
from diffusion_jax.interop.families.latent_diffusion import Layout, clip, has_vector, open_clip
from diffusion_jax.interop.family import Config, Family, Prompt, SingleFile
from diffusion_jax.interop.prompts import emphasised


def _added(outputs: Sequence, size: tuple[int, int]) -> dict[str, Array]:
    """The pooled prompt, and the sizes of an image that is neither scaled nor cropped: original size, top left corner
    of the crop, target size (Podell et al. 2023, section 2.2).
    """
    pooled = outputs[-1].pooled.astype(jnp.float32)
    return {"text_embeds": pooled, "time_ids": jnp.tile(jnp.float32([*size, 0, 0, *size]), (len(pooled), 1))}


def _is_wide(configs: dict[str, Config]) -> bool:
    return configs.get("unet", {}).get("addition_embed_type") == "text_time"


def _encoders(index: Config) -> list[str]:
    return [
        name for name in ("text_encoder", "text_encoder_2") if index.get(name) not in (None, [], [None], [None, None])
    ]


LAYOUT = Layout(
    matches=has_vector,
    sample_size=128,
    scaling_factor=0.13025,
    encoders=(
        ("text_encoder", "conditioner.embedders.0.transformer.", clip),
        ("text_encoder_2", "conditioner.embedders.1.model.", open_clip),
    ),
)
REFINER_LAYOUT = LAYOUT._replace(
    encoders=(("text_encoder_2", "conditioner.embedders.0.model.", open_clip),), needs_encoder=True
)
FAMILY = Family(
    name="Stable Diffusion XL",
    licence="CreativeML Open RAIL++-M",
    source="Podell et al. 2023, arXiv 2307.01952",
    recognises=lambda index, configs: _is_wide(configs),
    parts={"unet": UNET, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER, "text_encoder_2": TEXT_ENCODER},
    denoiser="unet",
    autoencoder="vae",
    tokenizers={"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"},
    prompt=Prompt(
        embed=emphasised(lambda output: output.penultimate),
        added=_added,
        sizes="time_ids",
        null_is_zeros=lambda index: index.get("force_zeros_for_empty_prompt", True),
    ),
    index=latent_diffusion.index_of("StableDiffusionXL", has_safety_checker=False),
    fits=latent_diffusion.fits,
    single_file=SingleFile(LAYOUT.read, latent_diffusion.SCHEDULER | {"prediction_type": "epsilon"}, LAYOUT.states),
    names=latent_diffusion.NAMES,
    embeddings={
        **dict.fromkeys(("clip_l", "text_encoders_0"), "text_encoder"),
        **dict.fromkeys(("clip_g", "text_encoders_1"), "text_encoder_2"),
    },
    sizes={"sdxl": sizes.SDXL},
)
REFINER = FAMILY._replace(
    name="the refiner of Stable Diffusion XL",
    recognises=lambda index, configs: _is_wide(configs) and _encoders(index) == ["text_encoder_2"],
    parts={"unet": UNET, "vae": AUTOENCODER, "text_encoder_2": TEXT_ENCODER},
    tokenizers={"text_encoder_2": "tokenizer_2"},
    prompt=None,  # its denoiser also wants an aesthetic score
    sizes={},
    single_file=FAMILY.single_file._replace(read=REFINER_LAYOUT.read, states=REFINER_LAYOUT.states),
)
