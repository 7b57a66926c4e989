"""Small transformers instead of the U-Nets of configs/digits.py and configs/latent_cfg.py:small.

python main.py --config=configs/transformer.py --mode=train
python main.py --config=configs/transformer.py --mode=sample --prompt "3; 7"

Presets, after a colon (`--config=configs/transformer.py:emoji`):
  digits             class-conditional digits, 8 x 8 pixels, of about as many FLOPs a call as the U-Net; the default
  digits/parameters  as many parameters
  emoji              64 x 64 emoji by their names, in latents, of about as many FLOPs a call as the U-Net
  emoji/parameters   as many parameters

Every pixel, or cell of a latent, is a token. The blocks are compiled once for all (scan), and their variables keep the
names of single blocks in an export. `python -m benchmarks.story networks` compares them with the U-Net.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

transformer.py  v5e:1x1  8.8 MB  under a minute
"""

from ml_collections import ConfigDict

from configs import digits, emoji

SIZES = {  # preset -> layers, heads, channels of a head
    "digits": (4, 4, 16),  # 0.33 M parameters, 31 MFLOP; the U-Net 0.70 M, 29 MFLOP
    "digits/parameters": (4, 4, 24),  # 0.73 M, 65 MFLOP
    "emoji": (6, 4, 32),  # 2.7 M parameters, 223 MFLOP; the U-Net 9.3 M, 214 MFLOP
    "emoji/parameters": (6, 8, 32),  # 9.3 M, 801 MFLOP
}


def get_config(preset: str = "digits") -> ConfigDict:
    """preset: one of the list above."""
    if preset not in SIZES:
        raise ValueError(f"unknown preset {preset!r} of transformer; known: {', '.join(SIZES)}")
    layers, heads, channels = SIZES[preset]
    of_digits = preset.startswith("digits")
    config = digits.get_config() if of_digits else emoji.small()
    config.name = "transformer" if preset == "digits" else f"transformer_{preset.replace('/', '_')}"
    config.model = ConfigDict(
        {
            "kind": "transformer",
            "in_channels": config.model.in_channels,
            "out_channels": config.model.out_channels,
            "patch_size": 1,
            "num_layers": layers,
            "num_attention_heads": heads,
            "attention_head_dim": channels,
            "norm": "rms_norm",
            "norm_elementwise_affine": True,
            "qk_norm": "rms_norm",
            "activation_fn": "swiglu",
            "mlp_ratio": 8 / 3,
            "positions": None,
            "axes_dims_rope": (channels // 2,) * 2,
            "scan": True,
        }
    )
    if of_digits:
        config.model.num_embeds_ada_norm = 10
    else:
        config.model.update(text="cross", cross_attention_dim=384)
        config.condition.pooled = False  # the vector of the whole text, which a transformer does not read
        config.weights, config.serve.live_weights = "", ""
    return config
