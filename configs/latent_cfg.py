"""Latent text-to-image diffusion with classifier-free guidance.

    python main.py --config=configs/latent_cfg.py --mode=train
    python main.py --config=configs/latent_cfg.py --mode=sample --prompt "a red apple; a kitty"

Presets, after a colon (`--config=configs/latent_cfg.py:full`):
  small        64 x 64 outlined drawings of 104 emoji in eleven colours, 15 minutes on 2 CPU cores
  everyday     64 x 64 drawings of 608 emoji in four styles and eleven colours, two hours on 2 CPU cores
  full         128 x 128 scenes of these in sizes, places and numbers, on grounds (docs/data.md): the demo weights,
               weights/emoji, were trained so around those of everyday, 7,800 steps in two hours (docs/results.md)
  fast         the same in one network call, or a few (--config.sample.steps): updates of the demo weights, trained
               as configs/few_step.py:lora/lcm (docs/few_steps.md)
  coco256      256 x 256 photographs with captions, TFDS coco_captions, for a TPU slice
  imagenet256  256 x 256 photographs of 1,000 classes, TFDS imagenet2012, for a TPU slice: 6 GB a chip on v5e-8, 8 h
               estimated from the compiled FLOPs at 40 % utilisation; not trained yet
All presets of emoji use the trained first stage in weights/emoji/vae (docs/results.md);
--config.autoencoder.checkpoint="" trains one from nothing.
"""

from ml_collections import ConfigDict

from configs import common

PROMPTS = (
    "a red apple",
    "a kitty",
    "a pizza",
    "a happy face",
    "a house",
    "a boat",
    "a blue fish",
    "a red dog",
    "a pink crab",
    "a purple lion",
    "a green rocket",
    "a blue heart",
)
STYLED = (
    "a red apple, outlined",
    "a cat, flat",
    "a happy face, shaded",
    "a boat, outlined",
    "a bicycle, line drawing",
    "a butterfly, flat",
    "a blue fish, shaded",
    "a red dog, flat",
    "a pink crab, flat",
    "a purple lion, line drawing",
    "a green rocket, shaded",
    "a blue heart, shaded",
)
SCENES = (
    "a red apple, shaded",
    "a hamburger on a yellow background, outlined",
    "a blue fish, outlined",
    "a purple lion, line drawing",
    "a yellow star on a blue background, flat",
    "a pink crab, outlined",
    "three red hearts, flat",
    "a robot on a green background, outlined",
    "a red dog, flat",
    "a pumpkin on a purple background, shaded",
    "a grinning face, outlined",
    "a sunflower on a blue background, outlined",
)


def get_config(preset: str = "small") -> ConfigDict:
    """preset: one of the list above."""
    presets = {
        "small": _small,
        "everyday": _everyday,
        "full": _full,
        "fast": _fast,
        "coco256": _coco256,
        "imagenet256": _imagenet256,
    }
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r} of latent_cfg; known: {', '.join(presets)}")
    return presets[preset]()


def _small() -> ConfigDict:
    config = _emoji("latent_cfg", size=64, prompts=PROMPTS)
    config.data.styles = ("outlined",)
    config.data.concepts = ("simple",)
    config.data.splits.train = "drawings"
    config.optimizer = common.optimizer(1e-3, warmup=100, decay="cosine")
    config.train = common.train(steps=1800, batch_size=32, ema=0.995, every=600)
    return config


def _everyday() -> ConfigDict:
    config = _emoji("everyday", size=64, prompts=STYLED)
    config.data.concepts = ("everyday",)
    config.data.splits.train = "drawings"
    config.optimizer = common.optimizer(1e-3, warmup=200, decay="cosine")
    config.train = common.train(steps=5600, batch_size=64, ema=0.999, every=500)
    return config


def _full() -> ConfigDict:
    config = _emoji("emoji", size=128, prompts=SCENES)
    config.data.concepts = ("everyday",)
    config.model.down_block_types = ("DownBlock2D", *config.model.down_block_types)
    config.model.up_block_types = (*config.model.up_block_types, "UpBlock2D")
    config.model.block_out_channels = (64, 64, 128, 160)
    config.optimizer = common.optimizer(1e-3, warmup=200, decay="cosine")
    config.optimizer.kind = "muon"
    config.train = common.train(steps=10_000, batch_size=64, ema=0.999, every=500)
    return config


def _fast() -> ConfigDict:
    from configs import few_step  # which begins with a preset of this file

    config = few_step.get_config("lora/lcm")
    config.name, config.weights, config.serve.live_weights = "fast", "weights/fast", ""
    config.train = common.train(steps=2800, batch_size=32, ema=0.99, every=400)
    config.sample.steps = 1
    return config


def _emoji(name: str, size: int, prompts: tuple[str, ...]) -> ConfigDict:
    """What the presets of emoji share: both stages, as those of the demo weights."""
    config = _latent(name, common.data("emoji", size))
    config.weights, config.serve.live_weights = "weights/emoji", "weights/fast"
    config.data.splits.first_stage = "mixed"
    config.condition = common.by_text(length=24)
    config.condition.pooled = True
    # min_snr gives little weight to the noisiest levels, where v tells the drawing and its colours from the caption
    config.objective = common.objective(weight="uniform")
    config.autoencoder = _autoencoder(
        channels=(16, 32, 96, 128), layers=1, groups=1, learning_rate=3e-3, steps=3600, batch_size=8
    )
    config.autoencoder.checkpoint = "weights/emoji/vae"
    config.autoencoder.optimizer.kind = "muon"
    config.autoencoder.loss.update(l1=0.0, l2=1.0, perceptual=0.0)
    config.model = ConfigDict(
        {
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
            "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
            "block_out_channels": (64, 128, 160),
            "layers_per_block": 1,
            "norm_num_groups": 16,
            "attention_head_dim": 4,
            "cross_attention_dim": 384,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 384,
        }
    )
    config.sample = common.sample(prompts, solver="dpmpp_2m", steps=20, guidance=3.0)
    # validation has concepts that are never trained on; so many pictures take five minutes on two cores
    config.eval.update(measures=("distances",), split="train", images=520, reference=1500)
    return config


def _coco256() -> ConfigDict:
    config = _latent("coco256", common.data("tfds:coco_captions", size=256, flip=True))
    config.data.upscale = True
    config.data.splits.validation = "val"
    config.condition = common.by_text(length=64)
    config.autoencoder = _autoencoder(
        channels=(128, 256, 512, 512), layers=2, groups=32, learning_rate=1e-4, steps=200_000, batch_size=64
    )
    config.model = _large_unet(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=384,
        attention_head_dim=8,
    )
    config.optimizer = common.optimizer(1e-4, warmup=5000)
    config.train = common.train(steps=400_000, batch_size=256, ema=0.9999, every=5000)
    prompts = (
        "a man riding a wave on a surfboard",
        "a plate of food on a table",
        "two giraffes near a tree",
        "a red bus",
    )
    config.sample = common.sample(prompts, solver="dpmpp_2m", steps=25, guidance=5.0, num_images=4)
    return config


def _imagenet256() -> ConfigDict:
    config = _latent("imagenet256", common.data("tfds:imagenet2012", size=256, flip=True))
    config.data.upscale = True
    config.condition = common.by_class(1000)
    config.autoencoder = _autoencoder(
        channels=(128, 256, 512, 512), layers=2, groups=32, learning_rate=1e-4, steps=200_000, batch_size=64
    )
    config.model = _large_unet(
        down_block_types=("AttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) + ("AttnUpBlock2D",) * 3,
        attention_head_dim=64,
        num_class_embeds=1001,
    )
    config.optimizer = common.optimizer(1e-4, warmup=5000)
    config.train = common.train(steps=500_000, batch_size=256, ema=0.9999, every=5000)
    prompts = ("207", "281", "388", "933")  # golden retriever, tabby, giant panda, cheeseburger
    config.sample = common.sample(prompts, solver="dpmpp_2m", steps=25, guidance=3.0, num_images=4)
    return config


def _latent(name: str, data: ConfigDict) -> ConfigDict:
    """The sections that all presets share."""
    config = common.own(name)
    config.data = data
    config.schedule = common.schedule("cosine")
    config.objective = common.objective()
    config.eval = common.evaluation(images=1000)
    return config


def _autoencoder(
    channels: tuple[int, ...], layers: int, groups: int, learning_rate: float, steps: int, batch_size: int
) -> ConfigDict:
    """A first stage. checkpoint: a diffusers-format VAE folder to use instead of training one. init: another one, whose
    weights training starts from. flip: mirror half of the images, for this stage alone.
    """
    return ConfigDict(
        {
            "kind": "kl",
            "checkpoint": "",
            "init": "",
            "flip": True,
            "model": {
                "block_out_channels": channels,
                "layers_per_block": layers,
                "latent_channels": 4,
                "norm_num_groups": groups,
            },
            "loss": common.reconstruction(),
            "optimizer": common.optimizer(learning_rate, warmup=100, decay="cosine"),
            "train": common.train(steps, batch_size, ema=0.995, every=500),
        }
    )


def _large_unet(**fields) -> ConfigDict:
    """The U-Net of the 256 x 256 presets: bfloat16, recomputing its blocks in the backward pass."""
    shared = {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (192, 384, 768, 768),
        "layers_per_block": 2,
        "dtype": "bfloat16",
        "remat": True,
    }
    return ConfigDict(shared | fields)
