"""Stable Diffusion 2.0 and 2.1: as 1, with OpenCLIP's text encoder, and for 768 pixels v instead of eps."""

from diffusion_jax.interop.families import latent_diffusion, sizes, stable_diffusion_1
from diffusion_jax.interop.families.latent_diffusion import Layout, has_linear_maps, has_vector
from diffusion_jax.interop.family import SingleFile

LAYOUT = Layout(
    matches=lambda unet: not has_vector(unet) and has_linear_maps(unet),
    sample_size=64,
    scaling_factor=0.18215,
    encoders=latent_diffusion.ONE_ENCODER,
)
FAMILY = stable_diffusion_1.FAMILY._replace(
    name="Stable Diffusion 2",
    licence="CreativeML Open RAIL++-M",
    source="Rombach et al. 2022, arXiv 2112.10752",
    recognises=lambda index, configs: bool(configs.get("unet", {}).get("use_linear_projection")),
    single_file=SingleFile(
        LAYOUT.read, latent_diffusion.SCHEDULER, LAYOUT.states, ask="set prediction to 'eps' (512-base) or 'v' (768)"
    ),
    sizes={"sd21": sizes.SD21},
)
