"""The first stage alone: a KL autoencoder, 8x smaller each side, 4 channels.

    python main.py --config=configs/autoencoder.py --mode=train
    python main.py --config=configs/autoencoder.py --mode=sample      # held-out images above their reconstructions

Then use it in a latent config: --config.autoencoder.checkpoint=runs/autoencoder

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

    autoencoder.py          v5e:1x1  58.1 MB  under a minute
    autoencoder.py:coco256  v5e:2x4  1.7 GB  13 h
"""

from ml_collections import ConfigDict

from configs import latent_cfg


def get_config(preset: str = "full") -> ConfigDict:
    """preset: as in configs/latent_cfg.py, whose first stage this is."""
    config = latent_cfg.get_config(preset)
    del config.model
    config.name = "autoencoder"
    config.weights = config.autoencoder.checkpoint = ""
    return config
