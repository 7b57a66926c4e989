"""Z-Image and Z-Image-Turbo: prompts in Qwen3's chat form, a transformer of flow on latents of FLUX.1's autoencoder.

Its authors' code has another scale of guidance: their g is 1 + g here, so that 1 is no guidance as in every family.

    v = v_prompt + g (v_prompt - v_null) = v_null + (1 + g) (v_prompt - v_null)
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.interop.components import AUTOENCODER, TOKENS, TRANSFORMER
from diffusion_jax.interop.families import chat, sizes, z_image_names
from diffusion_jax.interop.family import Config, Family
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.z_image import ZImageTransformer

NAME = "ZImagePipeline"
TURBO_SHIFT = 3.0  # of the scheduler, which is all that tells the folder of Turbo from that of Z-Image, whose is 6


def _recognises(index: Config, configs: Mapping[str, Config]) -> bool:
    """Also a folder that diffusers saved from a pipeline of another task, which has the same parts."""
    of_transformer = configs.get("transformer", {}).get("_class_name")
    return index.get("_class_name") == NAME or of_transformer == "ZImageTransformer2DModel"


def _latent_inputs(transformer: ZImageTransformer) -> dict[str, Array]:
    rng, side = np.random.default_rng(0), transformer.cell
    shapes = {"x": (1, 4 * side, 6 * side, transformer.in_channels), "text": (1, TOKENS, transformer.cap_feat_dim)}
    return {"t": jnp.array([984.375])} | {  # for the network 15.625: waves of large times have fewer exact digits
        name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()
    }


def _run_transformer(model: Any, inputs: Mapping[str, Any]) -> None:
    size = model.all_patch_size[0]
    model([inputs["x"][0][:, None]], 1 - inputs["t"] / 1000, [inputs["text"][0]], patch_size=size)


def _levels(cells: int, steps: int) -> Config:
    return {"sigmas": np.linspace(1, 1 / steps, steps)}


def _fits(transformer: ZImageTransformer, autoencoder: AutoencoderKL) -> str:
    if transformer.in_channels == autoencoder.channels:
        return ""
    return (
        f"expected a transformer of {autoencoder.channels} input channels, those of the autoencoder, got "
        f"{transformer.in_channels}"
    )


def _is_turbo(index: Config, scheduler: Config) -> bool:
    """Whether guidance is built in: as `is_distilled` of model_index.json says, else by the scheduler."""
    return index.get("is_distilled", scheduler.get("shift") == TURBO_SHIFT) is True


FAMILY = Family(
    name="Z-Image",
    licence="Apache 2.0",
    source="Tongyi-MAI 2025, arXiv 2511.22699",
    recognises=_recognises,
    parts={
        "text_encoder": chat.reader(states=(-2,)),
        "transformer": TRANSFORMER._replace(depth=2, inputs=_latent_inputs, run=_run_transformer),
        "vae": AUTOENCODER,
    },
    denoiser="transformer",
    autoencoder="vae",
    tokenizers={"text_encoder": "tokenizer"},
    prompt=chat.prompt(answer="", masked=True),
    index=lambda transformer: {"_class_name": NAME},
    fits=_fits,
    is_flow=True,
    levels=_levels,
    names=z_image_names.NAMES,
    sizes_of=z_image_names.sizes_of,
    has_guidance=_is_turbo,
    sizes={"z_image": sizes.Z_IMAGE, "z_image_turbo": sizes.Z_IMAGE_TURBO},
)
