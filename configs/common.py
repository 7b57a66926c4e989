"""What the configs share: the fields every run has, at values that suit most of them."""

from ml_collections import ConfigDict


def optimizer(learning_rate: float, warmup: int, decay: str = "constant") -> ConfigDict:
    """AdamW. warmup: steps. decay: "constant", or "cosine" down to 0 at the last step."""
    return ConfigDict(
        {
            "learning_rate": learning_rate,
            "warmup": warmup,
            "decay": decay,
            "b1": 0.9,
            "b2": 0.999,
            "weight_decay": 0.0,
            "clip": 1.0,
        }
    )


def train(steps: int, batch_size: int, ema: float, every: int) -> ConfigDict:
    """batch_size: global. ema: decay of the average. every: steps between checkpoints and sample grids."""
    return ConfigDict(
        {
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": 1,
            "ema": ema,
            "log_every": 20,
            "checkpoint_every": every,
            "snapshot_every": every,
            "max_bad_steps": 20,
        }
    )


def sample(prompts: tuple[str, ...], solver: str, steps: int, guidance: float, num_images: int = 1) -> ConfigDict:
    """num_images: for each prompt. batch_size: images drawn at once."""
    return ConfigDict(
        {
            "prompts": prompts,
            "solver": solver,
            "steps": steps,
            "spacing": "trailing",
            "guidance": guidance,
            "num_images": num_images,
            "batch_size": 64,
            "seed": 0,
        }
    )


def evaluation(images: int) -> ConfigDict:
    """Likelihood of held-out data. images: how many, fewer where there are fewer. steps: of the flow, four evaluations
    each. probes: of its divergence. terms: of the T of the bound, 0 for all. batch_size: images measured at once.
    """
    return ConfigDict({"images": images, "steps": 25, "probes": 1, "terms": 100, "batch_size": 64, "seed": 0})


def schedule(name: str, T: int = 1000) -> ConfigDict:
    """name: linear, scaled_linear, cosine, sigmoid, laplace, of T steps; or flow, of continuous time, with a shift."""
    return ConfigDict({"name": name, "T": T, "shift": 1.0, "zero_terminal_snr": False})


def data(source: str, size: int, flip: bool = False) -> ConfigDict:
    """source: "openmoji", "digits", "folder" (then path), or "tfds:NAME". size: pixels a side. data_dir: of TFDS, ""
    its default. splits: what the source calls the images to train on, those to validate on, and those that a first
    stage is trained on.
    """
    return ConfigDict(
        {
            "source": source,
            "path": "",
            "data_dir": "",
            "splits": {"train": "train", "validation": "validation", "first_stage": "train"},
            "size": size,
            "random_crop": False,
            "flip": flip,
            "upscale": False,
        }
    )
