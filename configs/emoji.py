"""Presets of emoji, which configs/latent_cfg.py offers and configs/few_step.py teaches students from."""

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


def small() -> ConfigDict:
    """64 x 64 outlined drawings of simple things."""
    config = _emoji("latent_cfg", size=64, prompts=PROMPTS)
    config.data.styles = ("outlined",)
    config.data.concepts = ("simple",)
    config.data.splits.train = "drawings"
    config.optimizer = common.optimizer(1e-3, warmup=100, decay="cosine")
    config.train = common.train(steps=1800, batch_size=32, ema=0.995, every=600)
    return config


def everyday() -> ConfigDict:
    """64 x 64 drawings of everyday things in four styles."""
    config = _emoji("everyday", size=64, prompts=STYLED)
    config.data.concepts = ("everyday",)
    config.data.splits.train = "drawings"
    config.optimizer = common.optimizer(1e-3, warmup=200, decay="cosine")
    config.train = common.train(steps=5600, batch_size=64, ema=0.999, every=500)
    return config


def full() -> ConfigDict:
    """128 x 128 scenes of everyday things: the demo weights, weights/emoji."""
    config = _emoji("emoji", size=128, prompts=SCENES)
    config.data.concepts = ("everyday",)
    config.model.down_block_types = ("DownBlock2D", *config.model.down_block_types)
    config.model.up_block_types = (*config.model.up_block_types, "UpBlock2D")
    config.model.block_out_channels = (64, 64, 128, 160)
    config.optimizer = common.optimizer(1e-3, warmup=200, decay="cosine")
    config.optimizer.kind = "muon"
    config.train = common.train(steps=10_000, batch_size=64, ema=0.999, every=500)
    return config


def further() -> ConfigDict:
    """The demo weights trained on for as long as there is time: small drawings, numbers, places and two things at once
    need attention to the caption in cells of 16 pixels. The rate is constant; averages stand for its decay.
    """
    config = full()
    config.name, config.weights, config.init = "further", "", f"{config.weights}/unet"
    config.serve.live_weights = ""
    config.model.down_block_types = ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3
    config.model.up_block_types = ("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",)
    config.optimizer = common.optimizer(6e-4, warmup=100)
    config.optimizer.kind = "muon"
    config.train = common.train(steps=100_000, batch_size=64, ema=0.999, every=250)
    config.train.update(post_hoc=True, snapshot_every=1000)
    return config


def _emoji(name: str, size: int, prompts: tuple[str, ...]) -> ConfigDict:
    """What the presets of emoji share: both stages, as those of the demo weights."""
    config = common.latent(name, common.data("emoji", size))
    config.weights, config.serve.live_weights = "weights/emoji", "weights/fast"
    config.data.splits.first_stage = "mixed"
    config.condition = common.by_text(length=24)
    config.condition.pooled = True
    # min_snr gives little weight to the noisiest levels, where v tells the drawing and its colours from the caption
    config.objective = common.objective(weight="uniform")
    config.autoencoder = common.autoencoder(
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
