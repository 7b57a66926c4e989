"""What the configs share: the fields every run has, at values that suit most of them."""

from ml_collections import ConfigDict, config_dict


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
    """What --mode=sample draws, and how.

    height, width: in pixels, 0 for those of data.size. num_images: for each prompt. batch_size: images drawn at once.
    order, eta: of solvers that have them, None for the solver's own.
    negative_prompt: what to lead away from, "" for no condition. rescale: phi in [0, 1], how much of the unguided
    image's contrast is kept. guidance_interval: (low, high) in sigma / alpha, (0, 0) for everywhere. cfg_pp: CFG++,
    with guidance in [0, 1]. dynamic_threshold: percentile in (0, 1], 0 for none, for models of pixels.
    image: a picture's path, to draw it anew; strength: how much of it changes, in [0, 1].
    mask: a picture's path, white where image is made new, whatever the strength; resample: RePaint's repeats of a step.
    tile: side in pixels of the tiles that larger images are decoded in to save memory, 0 for whole images.
    """
    return ConfigDict(
        {
            "prompts": prompts,
            "height": 0,
            "width": 0,
            "solver": solver,
            "steps": steps,
            "order": config_dict.placeholder(int),
            "eta": config_dict.placeholder(float),
            "spacing": "trailing",
            "guidance": guidance,
            "negative_prompt": "",
            "rescale": 0.0,
            "guidance_interval": (0.0, 0.0),
            "cfg_pp": False,
            "dynamic_threshold": 0.0,
            "image": "",
            "strength": 0.6,
            "mask": "",
            "resample": 1,
            "tile": 0,
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
    """name: linear, scaled_linear, cosine, sigmoid, of T steps; or of continuous time flow, with a shift, and edm, from
    sigma_min to sigma_max.
    """
    return ConfigDict(
        {"name": name, "T": T, "shift": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "zero_terminal_snr": False}
    )


def objective(prediction: str = "v", weight: str = "min_snr", drop: float = 0.1) -> ConfigDict:
    """prediction: eps, x0, v, flow, or edm with its sigma_data. weight: uniform, min_snr or truncated. levels: which
    noise levels training sees: uniform, laplace, lognormal or logit_normal. drop: how often the condition is left out.
    """
    return ConfigDict(
        {
            "name": "denoising",
            "prediction": prediction,
            "sigma_data": 0.5,
            "weight": weight,
            "levels": "uniform",
            "drop": drop,
        }
    )


def data(source: str, size: int, flip: bool = False) -> ConfigDict:
    """source: "openmoji", "digits", "folder" (then path), or "tfds:NAME". size: pixels a side. data_dir: of TFDS, ""
    its default. splits: what the source calls the images to train on, those to validate on, and those that a first
    stage is trained on. crops: of each image, where random_crop is on and latents are cached.
    """
    return ConfigDict(
        {
            "source": source,
            "path": "",
            "data_dir": "",
            "splits": {"train": "train", "validation": "validation", "first_stage": "train"},
            "size": size,
            "random_crop": False,
            "crops": 4,
            "flip": flip,
            "upscale": False,
        }
    )
