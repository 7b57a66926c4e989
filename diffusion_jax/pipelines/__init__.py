"""From prompts and pixels to pixels: pure functions over a denoiser, a codec and a plan."""

from diffusion_jax.pipelines.image_to_image import image_to_image, invert
from diffusion_jax.pipelines.inpaint import inpaint
from diffusion_jax.pipelines.interpolation import mix, slerp, variations
from diffusion_jax.pipelines.pipeline import Guidance, Pipeline, from_noise, guided
from diffusion_jax.pipelines.text_to_image import text_to_image

__all__ = [
    "Guidance",
    "Pipeline",
    "from_noise",
    "guided",
    "image_to_image",
    "inpaint",
    "invert",
    "mix",
    "slerp",
    "text_to_image",
    "variations",
]
