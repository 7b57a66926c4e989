"""Fields of the config.json of published networks that several benchmarks need."""

from collections.abc import Mapping

from diffusion_jax.interop.families import sizes

NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def _fields(config: Mapping) -> dict:
    """A config.json without the name of its class."""
    return {name: value for name, value in config.items() if name not in ("_class_name", "architectures")}


UNET, SDXL_UNET = _fields(sizes.UNET_1), _fields(sizes.UNET_XL)  # of Stable Diffusion 1.5 and XL
CLIP_L, CLIP_H, CLIP_BIG_G = map(_fields, (sizes.CLIP_L, sizes.CLIP_H, sizes.CLIP_BIG_G))
AUTOENCODER = _fields(sizes.AUTOENCODER)
AUTOENCODER_SIZE = {name: value for name, value in AUTOENCODER.items() if not name.endswith("_types")}
