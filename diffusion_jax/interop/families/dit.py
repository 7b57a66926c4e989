"""DiT: a class of ImageNet to an image of 256 or 512 pixels, by a transformer that also predicts its variance."""

from diffusion_jax.interop.components import AUTOENCODER, TRANSFORMER
from diffusion_jax.interop.family import Family
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
)
