"""Stable Diffusion 1.1 to 1.5 and its relatives."""

from diffusion_jax.interop.components import AUTOENCODER, TEXT_ENCODER, UNET
from diffusion_jax.interop.families import latent_diffusion, sizes
from diffusion_jax.interop.families.latent_diffusion import Layout, has_linear_maps, has_vector
from diffusion_jax.interop.family import Family, Prompt, SingleFile
from diffusion_jax.interop.prompts import emphasised
from diffusion_jax.interop.safety import load_safety_checker

LAYOUT = Layout(
    matches=lambda unet: not has_vector(unet) and not has_linear_maps(unet),
    sample_size=64,
    scaling_factor=0.18215,
    encoders=latent_diffusion.ONE_ENCODER,
    encoder_layer=1,
)
FAMILY = Family(
    name="Stable Diffusion 1",
    licence="CreativeML Open RAIL-M",
    source="Rombach et al. 2022, arXiv 2112.10752",
    recognises=lambda index, configs: "unet" in index,
    parts={"unet": UNET, "vae": AUTOENCODER, "text_encoder": TEXT_ENCODER},
    denoiser="unet",
    autoencoder="vae",
    tokenizers={"text_encoder": "tokenizer"},
    prompt=Prompt(embed=emphasised(lambda output: output.last_hidden_state), can_skip_layers=True),
    index=latent_diffusion.index_of("StableDiffusion", has_safety_checker=True),
    fits=latent_diffusion.fits,
    scheduler_changes={"clip_sample": False, "steps_offset": 1},
    safety_checker=load_safety_checker,
    single_file=SingleFile(LAYOUT.read, latent_diffusion.SCHEDULER | {"prediction_type": "epsilon"}, LAYOUT.states),
    names=latent_diffusion.NAMES,
    embeddings=dict.fromkeys(("emb_params", "clip_l", "text_encoders_0"), "text_encoder"),
    sizes={"sd15": sizes.SD15},
)
