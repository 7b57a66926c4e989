"""The cached latents of a small autoencoder: python -m tests.app.encoding FOLDER; prints how many devices encoded."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from configs import digits
from diffusion_jax import build, codec, parallel
from diffusion_jax.app import train
from diffusion_jax.data.sources import Source
from diffusion_jax.models.autoencoder import AutoencoderKL

COUNT, SIZE = 70, 8  # a full batch, and one that is padded


def main(folder: str) -> None:
    config = digits.get_config()
    config.data.flip = True
    autoencoder = AutoencoderKL(block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2)
    variables = jax.jit(autoencoder.init)(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    pictures = np.random.default_rng(0).integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)
    source = Source("pictures", COUNT, lambda i: {"image": pictures[i], "label": i % 10}, num_classes=10)
    devices, spread = set(), parallel.spread

    def noting(tree, batch):
        placed = spread(tree, batch)
        devices.update(*(leaf.devices() for leaf in jax.tree.leaves(placed) if leaf.ndim == 4))
        return placed

    parallel.spread = noting
    model = build.model.diffusion_model(config)._replace(codec=codec.autoencoder_kl(autoencoder, variables))
    train._training_records(config, folder, source, model)
    print(len(devices))


if __name__ == "__main__":
    main(sys.argv[1])
