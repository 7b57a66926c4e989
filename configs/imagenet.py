"""The ImageNet presets of configs/latent_cfg.py: 256 x 256 photographs of 1,000 classes."""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import common

IMAGES = 1_281_167
PROMPTS = ("207", "281", "388", "933")  # golden retriever, tabby, giant panda, cheeseburger


class Size(NamedTuple):
    """layers, width, heads: of the transformer. batch: of all chips; the learning rate is in proportion to it.

    accumulate: micro-batches of a chip's share, so that the activations fit a v5e.
    parallel: pmap, or fsdp where the state does not fit one.
    """

    layers: int
    width: int
    heads: int
    batch: int = 1024
    accumulate: int = 4
    parallel: str = "pmap"


SIZES = {
    "S": Size(12, 384, 6),
    "B": Size(12, 768, 12, accumulate=8),
    "L": Size(24, 1024, 16, accumulate=16, parallel="fsdp"),
    "XL": Size(28, 1152, 16, accumulate=32, parallel="fsdp"),
}


def transformer(name: str = "B") -> ConfigDict:
    """JLT (arXiv 2605.27102): a transformer that predicts x0 in the latents of FLUX.2's autoencoder, 16 x 16 x 128.

    name: one of SIZES; B is the paper's.
    """
    size, epochs, warmup = SIZES[name], 200, 5
    config = _photographs("imagenet256" if name == "B" else f"imagenet256_{name.lower()}")
    config.autoencoder = common.trained_autoencoder(
        patch_size=(2, 2), block_out_channels=(128, 256, 512, 512), latent_channels=32
    )
    config.model = ConfigDict(
        {
            "kind": "transformer",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "num_layers": size.layers,
            "num_attention_heads": size.heads,
            "attention_head_dim": size.width // size.heads,
            "num_embeds_ada_norm": 1000,
            "norm": "rms_norm",
            "norm_elementwise_affine": True,
            "qk_norm": "rms_norm",
            "activation_fn": "swiglu",
            "mlp_ratio": 8 / 3,
            "positions": None,
            "axes_dims_rope": (size.width // size.heads // 2,) * 2,
            "dtype": "bfloat16",
            "scan": True,
        }
    )
    config.schedule = common.schedule("flow")
    config.objective = common.objective("x0", "velocity", drop=0.1)
    config.objective.levels = "lognormal_jit"
    config.optimizer = common.optimizer(5e-5 * size.batch / 256, warmup=warmup * IMAGES // size.batch)
    config.optimizer.b2 = 0.95
    config.train = common.train(epochs * IMAGES // size.batch, size.batch, ema=0.9999, every=5000)
    config.train.update(accumulate=size.accumulate, parallel=size.parallel)
    config.sample = common.sample(PROMPTS, solver="flow_heun", steps=50, guidance=2.9, num_images=4)
    config.sample.floor = 0.05
    config.sample.guidance_interval = (0.0, 8.99)  # u below 0.9: at 0.9 itself, sigma / alpha is 9
    return config


def one_call() -> ConfigDict:
    """The same transformer for one network call, by improved MeanFlow (Geng et al. 2025b) from random weights.

    Guidance is learned from itself, and sample.guidance and sample.guidance_interval are inputs of the network; their
    values are those of the authors' code for their B/2.
    """
    config = transformer()
    config.name = "imagenet256_imf"
    config.model.update(target_embedding=True, interval_embedding=True, time_cond_proj_dim=256)
    config.objective = common.objective("flow", weight="")
    config.objective.update(name="improved_mean_flow", levels="even", plain=0.5, robust=0.5, scale=8.0)
    config.sample = common.sample(PROMPTS, solver="ddim", steps=1, guidance=7.5, num_images=4)
    config.sample.guidance_interval = (0.667, 1.857)  # u from 0.4 to 0.65
    return config


def unet() -> ConfigDict:
    """A U-Net in latents of a first stage trained here."""
    config = _photographs("imagenet256_unet")
    config.autoencoder = common.autoencoder(
        channels=(128, 256, 512, 512), layers=2, groups=32, learning_rate=1e-4, steps=200_000, batch_size=64
    )
    config.model = common.large_unet(
        down_block_types=("AttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) + ("AttnUpBlock2D",) * 3,
        attention_head_dim=64,
        num_class_embeds=1001,
    )
    config.schedule = common.schedule("flow")
    config.objective = common.objective("flow", "uniform")
    config.objective.levels = "logit_normal"
    config.optimizer = common.optimizer(2e-4, warmup=5000, decay="cosine")
    config.train = common.train(steps=125_000, batch_size=1024, ema=0.9999, every=5000)
    config.train.update(accumulate=4, post_hoc=True)
    config.sample = common.sample(PROMPTS, solver="dpmpp_2m", steps=25, guidance=3.0, num_images=4)
    return config


def _photographs(name: str) -> ConfigDict:
    config = common.latent(name, common.data("tfds:imagenet2012", size=256, flip=True))
    config.data.upscale = True
    config.condition = common.by_class(1000)
    return config
