"""Class-conditional digits, 8 x 8 pixels: the whole system in two minutes on a CPU.

python main.py --config=configs/digits.py --mode=train
python main.py --config=configs/digits.py --mode=sample --prompt "3; 7"

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

digits.py  v5e:1x1  25.8 MB  under a minute
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.trained("digits")
    config.data = common.data("digits", size=8)
    config.condition = common.by_class(10)
    config.autoencoder = ConfigDict({"kind": "identity"})
    config.model = ConfigDict(
        {
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": 16,
            "num_class_embeds": 11,
        }
    )
    config.schedule = common.schedule("cosine")
    config.objective = common.objective()
    config.optimizer = common.optimizer(2e-3, warmup=50, decay="cosine")
    config.train = common.train(steps=700, batch_size=64, ema=0.99, every=700)
    config.sample = common.sample(tuple("0123456789"), solver="dpmpp_2m", steps=20, guidance=2.0, num_images=8)
    config.eval = common.evaluation(images=180)
    return config
