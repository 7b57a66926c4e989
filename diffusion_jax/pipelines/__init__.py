"""From prompts to pixels: pure functions over a denoiser, a codec and a plan."""

from diffusion_jax.pipelines.text_to_image import Pipeline, text_to_image

__all__ = ["Pipeline", "text_to_image"]
