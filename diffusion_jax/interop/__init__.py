"""Read and write checkpoints of diffusers, transformers and the original Stable Diffusion code."""

from diffusion_jax.interop.encoders import load_text_encoder, save_text_encoder
from diffusion_jax.interop.folders import (
    load_autoencoder,
    load_transformer,
    load_unet,
    save_autoencoder,
    save_transformer,
    save_unet,
)
from diffusion_jax.interop.pipeline import PublishedPipeline, load_pipeline, save_pipeline
from diffusion_jax.interop.tokenizers import load_tokenizer

__all__ = [
    "PublishedPipeline",
    "load_autoencoder",
    "load_pipeline",
    "load_text_encoder",
    "load_tokenizer",
    "load_transformer",
    "load_unet",
    "save_autoencoder",
    "save_pipeline",
    "save_text_encoder",
    "save_transformer",
    "save_unet",
]
