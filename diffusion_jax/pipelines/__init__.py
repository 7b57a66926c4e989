"""From prompts and images to images: pure functions of a model and a plan."""

from diffusion_jax.core.guidance import Guidance
from diffusion_jax.pipelines.generate import Every, from_noise
from diffusion_jax.pipelines.image_to_image import image_to_image, invert
from diffusion_jax.pipelines.inpaint import inpaint
from diffusion_jax.pipelines.interpolation import mix, slerp, variations
from diffusion_jax.pipelines.references import with_references
from diffusion_jax.pipelines.text_to_image import text_to_image

__all__ = [
    "Every",
    "Guidance",
    "from_noise",
    "image_to_image",
    "inpaint",
    "invert",
    "mix",
    "slerp",
    "text_to_image",
    "variations",
    "with_references",
]
