"""Latent text-to-image diffusion with classifier-free guidance.

    python main.py --config=configs/latent_cfg.py --mode=train
    python main.py --config=configs/latent_cfg.py --mode=sample --prompt "a red apple; a kitty"

Presets, after a colon (`--config=configs/latent_cfg.py:full`):
  small        64 x 64 outlined drawings of 104 emoji in eleven colours, 15 minutes on 2 CPU cores
  everyday     64 x 64 drawings of 756 emoji in four styles and eleven colours; of 608 two hours on 2 CPU cores
  full         128 x 128 scenes of these in sizes, places and numbers, on grounds (docs/emoji.md): the demo weights,
               weights/emoji, were trained so on the first 608, around those of everyday, 7,800 steps in two hours
               (docs/results.md)
  further      the demo weights trained on, with attention to the caption in one more level: stop and resume it at will
               (docs/emoji.md)
  fast         the same in one network call, or a few (--config.sample.steps): updates of the demo weights, trained
               as configs/few_step.py:lora/lcm (docs/few_steps.md)
  coco256      256 x 256 photographs with captions, TFDS coco_captions, for a TPU slice;
               --config.condition.encoders="('FOLDER',)" takes CLIP or T5 instead of MiniLM (docs/text.md)
  imagenet256  256 x 256 photographs of 1,000 classes, TFDS imagenet2012, by a transformer in the latents of FLUX.2's
               autoencoder (--config.autoencoder.checkpoint=FOLDER); not trained yet (docs/transformers.md)
  imagenet256/S, B (the same), L, XL    its size
  imagenet256/imf   the same for one network call, guided, by improved MeanFlow; not tried
  imagenet256/unet  by a U-Net in the latents of a first stage of its own; not trained yet
All presets of emoji use the trained first stage in weights/emoji/vae (docs/results.md);
--config.autoencoder.checkpoint="" trains one from nothing.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.
coco256 and imagenet256/unet train a first stage too, for 13 h of these.

    latent_cfg.py:small             v5e:1x1  0.2 GB  under a minute
    latent_cfg.py:everyday          v5e:1x1  0.2 GB  under a minute
    latent_cfg.py:full              v5e:1x1  0.2 GB  under a minute
    latent_cfg.py:further           v5e:1x1  0.3 GB  2.2 min
    latent_cfg.py:fast              v5e:1x1  0.2 GB  under a minute
    latent_cfg.py:coco256           v5e:2x4  6.2 GB  23 h
    latent_cfg.py:imagenet256/S     v5e:2x4  0.8 GB  4.1 h
    latent_cfg.py:imagenet256       v5e:2x4  3.1 GB  16 h
    latent_cfg.py:imagenet256/L     v5e:2x4  1.4 GB  55 h
    latent_cfg.py:imagenet256/XL    v5e:2x4  2.0 GB  80 h
    latent_cfg.py:imagenet256/imf   v5e:2x4  3.2 GB  52 h
    latent_cfg.py:imagenet256/unet  v5e:2x4  7.5 GB  22 h
"""

import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import common, emoji, few_step, imagenet


def get_config(preset: str = "small") -> ConfigDict:
    """preset: one of the list above."""
    presets = {
        "small": emoji.small,
        "everyday": emoji.everyday,
        "full": emoji.full,
        "further": emoji.further,
        "fast": _fast,
        "coco256": _coco256,
        "imagenet256": imagenet.transformer,
        **{f"imagenet256/{size}": functools.partial(imagenet.transformer, size) for size in imagenet.SIZES},
        "imagenet256/imf": imagenet.one_call,
        "imagenet256/unet": imagenet.unet,
    }
    if preset not in presets:
        raise ValueError(f"unknown preset {preset!r} of latent_cfg; known: {', '.join(presets)}")
    return presets[preset]()


def _fast() -> ConfigDict:
    config = few_step.get_config("lora/lcm")
    config.name, config.weights, config.serve.live_weights = "fast", "weights/fast", ""
    config.train = common.train(steps=2800, batch_size=32, ema=0.99, every=400)
    config.sample.steps = 1
    return config


def _coco256() -> ConfigDict:
    config = common.latent("coco256", common.data("tfds:coco_captions", size=256, flip=True))
    config.data.upscale = True
    config.data.splits.validation = "val"
    config.condition = common.by_text(length=64)
    config.autoencoder = common.autoencoder(
        channels=(128, 256, 512, 512), layers=2, groups=32, learning_rate=1e-4, steps=200_000, batch_size=64
    )
    config.model = common.large_unet(
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=placeholder(int),  # the width of the text encoders
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
