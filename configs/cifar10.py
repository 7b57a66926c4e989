"""The DDPM paper's CIFAR-10 model (Ho et al. 2020, appendix B): 35.7M parameters, unconditional, 32 x 32 pixels.

    python main.py --config=configs/cifar10.py --mode=train
    python main.py --config=configs/cifar10.py --mode=sample

TFDS prepares `cifar10` once (`pip install tensorflow` for that step alone, then
`tfds.builder("cifar10", file_format="array_record").download_and_prepare()`); training reads it without TensorFlow.
The paper reaches FID 3.17 after 800k steps. This config has not been trained to the end yet.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

    cifar10.py  v5e:2x2  0.7 GB  2.9 h
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.trained("cifar10")
    config.data = common.data("tfds:cifar10", size=32, flip=True)
    config.data.splits.validation = "test"
    config.condition = common.unconditional()
    config.autoencoder = ConfigDict({"kind": "identity"})
    config.model = ConfigDict(
        {
            "in_channels": 3,
            "out_channels": 3,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (128, 256, 256, 256),
            "layers_per_block": 2,
            "downsample_padding": 0,
            "dropout": 0.1,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
        }
    )
    config.schedule = common.schedule("linear")
    config.objective = common.objective("eps", "uniform", drop=0.0)
    config.optimizer = common.optimizer(2e-4, warmup=5000)
    config.train = common.train(steps=800_000, batch_size=128, ema=0.9999, every=10_000)
    config.train.log_every = 100
    config.sample = common.sample(("",), solver="ddpm", steps=1000, guidance=1.0, num_images=64)
    config.eval = common.evaluation(images=10_000)
    return config
