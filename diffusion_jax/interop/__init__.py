"""Checkpoints of other ecosystems, in and out."""

from diffusion_jax.interop.folders import load_autoencoder, load_unet, save_autoencoder, save_unet

__all__ = ["load_autoencoder", "load_unet", "save_autoencoder", "save_unet"]
