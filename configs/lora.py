"""A LoRA of Stable Diffusion: small updates of its attention, trained on a few captioned images.

    LORA="python main.py --config=configs/lora.py --config.checkpoint=FOLDER"
    $LORA --mode=train --config.data.path=PHOTOS
    $LORA --mode=sample --prompt "…"
    $LORA --mode=export                    # runs/lora/export/lora.safetensors, for diffusers and others too

Later, or with somebody else's file: --config=configs/published.py --config.loras="('FILE@0.8',)".
The weights of the checkpoint do not change and stay in config.dtype. Only the updates have gradients, optimizer state
and average. This was tried on a small model (docs/results.md), not yet on a published one.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

    lora.py --config.checkpoint=sd15  v5e:1x1  3.5 GB  1.9 min
"""

from ml_collections import ConfigDict

from configs import common, published


def get_config(arg: str = "") -> ConfigDict:
    """The fields of configs/published.py, and config.lora with the rank of the updates and the updated maps, by
    default all attention.
    """
    config = published.get_config(arg)
    config.name = "lora"
    config.lora = common.lora()
    config.optimizer = common.optimizer(1e-4, warmup=50)
    config.train = common.train(steps=1000, batch_size=4, ema=0.99, every=100)
    return config
