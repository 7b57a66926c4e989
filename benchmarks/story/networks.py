"""The U-Net beside transformers of as many FLOPs, as many parameters, and as many minutes of training."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from benchmarks.story import digits, emoji
from benchmarks.story.runs import Runs, figures, ratio, spread, table
from configs import transformer
from diffusion_jax import build
from diffusion_jax.flops import flops
from diffusion_jax.model import DiffusionModel

SEEDS = 3
TINY = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (4, 4)}


def of_digits(runs: Runs, axes: plt.Axes) -> None:
    """Classes, without guidance. The U-Nets are the models of `seeds`."""
    _compared(
        "networks", "digits", lambda seed: digits.digits_config(runs.small, seed), runs, axes, unet="seeds/{seed}"
    )


def of_emoji(runs: Runs, axes: plt.Axes) -> None:
    """Texts, in the latents of 64 x 64 pictures."""

    def config(seed: int) -> ConfigDict:
        made = emoji.demo_config(runs.small, "small")
        made.weights, made.seed = "", seed
        made.eval.update(measures=("distances",), seed=seed)
        made.train.update(checkpoint_every=made.train.steps, snapshot_every=made.train.steps)
        if runs.small:
            made.data.splits.train = "drawings[:60]"
            made.model.update(block_out_channels=(16, 16, 16))
            made.train.update(steps=2, batch_size=4)
        return made

    _compared("emoji_networks", "emoji", config, runs, axes, unet="emoji_networks/unet_{seed}")


def _compared(name: str, data: str, config: Callable[[int], ConfigDict], runs: Runs, axes: plt.Axes, unet: str) -> None:
    """Train and measure all networks with every seed.

    data: of the presets of configs/transformer.py.
    config: seed -> the config with the U-Net.
    unet: the name of its runs.
    """
    seconds_of_unet, rows = runs.seconds_per_step(f"{name}/unet", config(0), 2 if runs.small else 50), []
    kinds = {"U-Net": "", "transformer, FLOPs": data, "transformer, parameters": f"{data}/parameters"}
    kinds["transformer, FLOPs and minutes"] = data
    for label, preset in kinds.items():
        seconds = seconds_of_unet
        if preset:
            timed = f"{name}/{preset.replace('/', '_')}"
            seconds = runs.seconds_per_step(timed, _changed(config(0), preset, runs.small), 2 if runs.small else 50)
        reports = []
        for seed in range(1 if runs.small else SEEDS):
            made, run = config(seed), unet
            if preset:
                made = _changed(made, preset, runs.small)
                run = f"{name}/{label.replace('transformer, ', '').replace(' ', '_')}_{{seed}}"
            if label.endswith("minutes"):
                steps = max(round(made.train.steps * seconds_of_unet / seconds), 1)
                made.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
            reports.append(runs.measured(run.format(seed=seed), made))
        network = made.eval.networks[0]
        values = [ratio(report, network)[0] for report in reports]
        coverage = [figures(report, network)["coverage"]["generated"]["mean"] for report in reports]
        model = build.model.diffusion_model(made)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
        size = f"{parameters / 1e6:.3g}", f"{_flops(model) / 1e6:.3g}", f"{seconds:.3g}", str(made.train.steps)
        rows.append((label, *size, spread(values), spread(coverage)))
        axes.errorbar(label, np.mean(values), np.std(values), fmt="o", color="C0")
    axes.set_ylabel(f"Frechet ratio, {network}")
    head = "M parameters", "MFLOP of a call", "seconds a step", "steps", f"ratio, {network}", f"coverage, {network}"
    table(("network: as many", *head), rows)


def _flops(model: DiffusionModel) -> float:
    """Of one call of the network for one picture."""
    x, cond = jnp.zeros((1, *model.shape)), jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model.conditioning.null)
    return flops(model.network.apply, model.params, x, jnp.zeros(1), cond)


def _changed(config: ConfigDict, preset: str, small: bool) -> ConfigDict:
    """The config with the network of a preset of configs/transformer.py."""
    of_preset = transformer.get_config(preset)
    config.model, config.condition = of_preset.model, of_preset.condition
    if small:
        config.model.update(TINY)
    return config
