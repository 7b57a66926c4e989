"""Configs of a tiny transformer of digits: `plain`, `single` (blocks compiled one by one), `flow_map`, `lora`, and
`latent`, the recipe of ImageNet in the latents of an autoencoder like FLUX.2's.
"""

from configs import common, digits, imagenet, transformer
from diffusion_jax import build

WIDTHS = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (4, 4)}
AUTOENCODER = {
    "patch_size": (2, 2),
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "latent_channels": 2,
    "norm_num_groups": 2,
}


def get_config(preset="plain"):
    config = _latent() if preset == "latent" else transformer.get_config()
    config.model.update(WIDTHS)
    config.train.update(steps=6, batch_size=8, log_every=3, checkpoint_every=3)
    config.optimizer.update(warmup=0, learning_rate=1e-2, decay="constant")
    config.sample.update(prompts=("3", "7"), num_images=2, steps=3)
    config.model.scan = preset != "single"
    if preset == "flow_map":
        config.model.update(target_embedding=True, time_cond_proj_dim=16, interval_embedding=True)
        config.objective.update(name="improved_mean_flow", plain=0.5, weight="", levels="", scale=4.0)
        config.sample.update(solver="ddim", steps=2, guidance=3.0, guidance_interval=(0.1, 9.0))
    if preset == "lora":
        config.lora = common.lora()
    return config


def _latent():
    config, of_digits = imagenet.transformer(), digits.get_config()
    config.name, config.data, config.condition = "latent", of_digits.data, of_digits.condition
    config.autoencoder.model = AUTOENCODER
    channels = build.model.autoencoder(config).channels
    config.model.update(in_channels=channels, out_channels=channels, num_embeds_ada_norm=10, dtype="float32")
    config.train.accumulate = 2
    return config
