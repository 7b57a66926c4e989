"""Latent text-to-image diffusion with classifier-free guidance.

    python main.py --config=configs/latent_cfg.py --mode=train
    python main.py --config=configs/latent_cfg.py --mode=sample --prompt "red apple; a kitty"
"""

from ml_collections import ConfigDict

from configs import common

PROMPTS = (
    "grinning cat",
    "red apple",
    "flag of Japan",
    "sunflower",
    "rocket",
    "pizza",
    "kitty",
    "a cup of tea",
    "happy yellow face",
    "a tall building",
    "blue fish",
    "a heart",
)


def get_config(preset: str = "openmoji") -> ConfigDict:
    """preset: "openmoji"."""
    config = ConfigDict()
    config.name = "latent_cfg"
    config.seed = 0
    config.weights = "weights/latent_cfg"
    config.data = common.data("openmoji", size=64)
    config.condition = ConfigDict({"kind": "text", "length": 16})
    config.autoencoder = ConfigDict(
        {
            "kind": "kl",
            "checkpoint": "",
            "model": {
                "block_out_channels": (8, 16, 32, 64),
                "layers_per_block": 1,
                "latent_channels": 4,
                "norm_num_groups": 8,
                "sample_size": 64,
            },
            "loss": {
                "l1": 1.0,
                "l2": 2.0,
                "perceptual": 0.1,
                "perceptual_net": "alex",
                "kl": 1e-6,
                "adversarial": 0.0,
            },
            "optimizer": common.optimizer(2e-3, warmup=100, decay="cosine"),
            "train": common.train(steps=800, batch_size=16, ema=0.995, every=400),
        }
    )
    config.model = ConfigDict(
        {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (96, 128),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 4,
            "cross_attention_dim": 384,
        }
    )
    config.schedule = ConfigDict({"name": "cosine", "T": 1000})
    config.objective = ConfigDict({"prediction": "v", "weight": "min_snr", "drop": 0.1})
    config.optimizer = common.optimizer(1e-3, warmup=100, decay="cosine")
    config.train = common.train(steps=1000, batch_size=64, ema=0.999, every=200)
    config.sample = common.sample(PROMPTS, solver="dpmpp_2m", steps=20, guidance=3.0)
    return config
