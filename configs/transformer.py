"""Class-conditional digits, 8 x 8 pixels, by a small transformer instead of the U-Net of configs/digits.py.

python main.py --config=configs/transformer.py --mode=train
python main.py --config=configs/transformer.py --mode=sample --prompt "3; 7"

Every pixel is a token. The blocks are compiled once for all (scan), and their variables keep the names of single blocks
in an export.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

transformer.py  v5e:1x1  8.8 MB  under a minute
"""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.name = "transformer"
    config.model = ConfigDict(
        {
            "kind": "transformer",
            "in_channels": 3,
            "out_channels": 3,
            "patch_size": 1,
            "num_layers": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "num_embeds_ada_norm": 10,
            "norm": "rms_norm",
            "norm_elementwise_affine": True,
            "qk_norm": "rms_norm",
            "activation_fn": "swiglu",
            "mlp_ratio": 8 / 3,
            "positions": None,
            "axes_dims_rope": (8, 8),
            "scan": True,
        }
    )
    return config
