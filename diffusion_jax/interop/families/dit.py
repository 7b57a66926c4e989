"""DiT: a class of ImageNet to an image of 256 or 512 pixels, by a transformer that also predicts its variance.

SiT is the same network, trained on straight paths.
"""

import numpy as np

from diffusion_jax.interop.components import AUTOENCODER, TRANSFORMER
from diffusion_jax.interop.families import original_dit
from diffusion_jax.interop.family import Family, SingleFile
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.transformer import Transformer


def _fits(transformer: Transformer, autoencoder: AutoencoderKL) -> str:
    channels = autoencoder.channels
    if transformer.in_channels == channels and (transformer.out_channels or channels) in (channels, 2 * channels):
        return ""
    return (
        f"expected a transformer of {channels} input channels, those of the autoencoder, and {channels} or "
        f"{2 * channels} output channels, got {transformer.in_channels} and {transformer.out_channels}"
    )


FAMILY = Family(
    name="DiT",
    licence="CC BY-NC 4.0",
    source="Peebles & Xie 2022, arXiv 2212.09748",
    recognises=lambda index, configs: index.get("_class_name") == "DiTPipeline",
    parts={"transformer": TRANSFORMER, "vae": AUTOENCODER},
    denoiser="transformer",
    autoencoder="vae",
    tokenizers={},
    prompt=None,
    classes=lambda transformer: transformer.num_embeds_ada_norm,
    index=lambda transformer: {"_class_name": "DiTPipeline"},
    fits=_fits,
    single_file=SingleFile(
        read=original_dit.read,
        scheduler={
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "clip_sample": False,
        },
        ask="set prediction to eps for DiT, and to flow for SiT, whose files look alike",
    ),
)
SIT = FAMILY._replace(
    name="SiT",
    licence="MIT",
    source="Ma et al. 2024, arXiv 2401.08740",
    recognises=lambda index, configs: index.get("_class_name") == "SiTPipeline",
    index=lambda transformer: {"_class_name": "SiTPipeline"},
    is_flow=True,
    levels=lambda cells, steps: {"sigmas": np.linspace(1, 1 / steps, steps)},
    single_file=SingleFile(
        read=original_dit.read_velocity,
        scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1, "shift": 1.0},
    ),
)
