"""Sections that the configs share, with common values.

diffusion_jax/build/fields.py lists all fields with their meaning and range.
"""

from ml_collections import ConfigDict

from diffusion_jax.build import fields


def trained(name: str) -> ConfigDict:
    """Top-level fields of a config that trains a model of its own."""
    return fields.section(fields.RUN | fields.TRAINED, name=name, serve=fields.section(fields.SERVE))


def published(name: str) -> ConfigDict:
    """Top-level fields of a config whose model is a published checkpoint."""
    return fields.section(fields.RUN | fields.PUBLISHED, name=name, serve=fields.section(fields.SERVE))


def unconditional() -> ConfigDict:
    """No condition."""
    return fields.section(fields.CONDITION, kind="none")


def by_class(num_classes: int) -> ConfigDict:
    """The condition is a class."""
    return fields.section(fields.CONDITION, kind="class", num_classes=num_classes)


def by_text(length: int) -> ConfigDict:
    """The condition is a caption of `length` tokens, with start and end token."""
    return fields.section(fields.CONDITION, kind="text", length=length)


def optimizer(learning_rate: float, warmup: int, decay: str = "constant") -> ConfigDict:
    """AdamW. warmup: steps. decay: "constant", or "cosine" down to 0 at the last step."""
    return fields.section(fields.OPTIMIZER, learning_rate=learning_rate, warmup=warmup, decay=decay)


def train(steps: int, batch_size: int, ema: float, every: int) -> ConfigDict:
    """batch_size: global. ema: decay of the average. every: steps between checkpoints and sample grids."""
    return fields.section(
        fields.TRAIN, steps=steps, batch_size=batch_size, ema=ema, checkpoint_every=every, snapshot_every=every
    )


def sample(prompts: tuple[str, ...], solver: str, steps: int, guidance: float, num_images: int = 1) -> ConfigDict:
    """Settings of --mode=sample. num_images: for each prompt."""
    return fields.section(
        fields.SAMPLE, prompts=prompts, solver=solver, steps=steps, guidance=guidance, num_images=num_images
    )


def evaluation(images: int) -> ConfigDict:
    """Likelihood of held-out data. images: how many, or all if there are fewer."""
    return fields.section(fields.EVAL, images=images)


def schedule(name: str, T: int = 1000) -> ConfigDict:
    """name: linear, scaled_linear, cosine, sigmoid, of T steps; flow, edm, of continuous time."""
    return fields.section(fields.SCHEDULE, name=name, T=T)


def objective(prediction: str = "v", weight: str = "min_snr", drop: float = 0.1) -> ConfigDict:
    """prediction: eps, x0, v, flow or edm. weight: of the loss. drop: probability of training without the condition."""
    return fields.section(fields.OBJECTIVE, prediction=prediction, weight=weight, drop=drop)


def reconstruction() -> ConfigDict:
    """The loss of a first stage."""
    return fields.section(fields.LOSS)


def lora() -> ConfigDict:
    """Small updates of a network's linear maps."""
    return fields.section(fields.LORA)


def data(source: str, size: int, flip: bool = False) -> ConfigDict:
    """source: "emoji", "digits", "folder" (then path), or "tfds:NAME". size: pixels a side."""
    section = fields.section(fields.DATA, source=source, size=size, flip=flip)
    section.splits = fields.section(fields.SPLITS)
    return section


def latent(name: str, data: ConfigDict) -> ConfigDict:
    """The fields that latent models trained here share.

    Each config adds condition, autoencoder, model, optimizer, train and sample.
    """
    config = trained(name)
    config.data = data
    config.schedule = schedule("cosine")
    config.objective = objective()
    config.eval = evaluation(images=1000)
    return config


def autoencoder(
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
            "loss": reconstruction(),
            "optimizer": optimizer(learning_rate, warmup=100, decay="cosine"),
            "train": train(steps, batch_size, ema=0.995, every=500),
        }
    )


def trained_autoencoder(**fields) -> ConfigDict:
    """A first stage that is not trained here: name its folder as config.autoencoder.checkpoint. fields: of its network,
    so that shapes are known without it.
    """
    return ConfigDict({"kind": "kl", "checkpoint": "", "model": fields})


def large_unet(**fields) -> ConfigDict:
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
