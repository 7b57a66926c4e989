"""The embedded text-to-image model."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from benchmarks.story.runs import OVERLAP, Report, Runs, figures, overlap, ratio, table
from configs import latent_cfg
from diffusion_jax import build
from diffusion_jax.model import DiffusionModel

NETWORKS = ("vgg16", "alexnet")
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 15.0)
CALLS = (1, 2, 4)  # of the student
TRAINING = 300  # seconds of training in `latents`


def demo_config(small: bool, preset: str = "full") -> ConfigDict:
    """The demo weights, or their student, `fast`."""
    config = latent_cfg.get_config(preset)
    config.sample.batch_size = 64
    config.eval.update(
        measures=("distances", "scenes"), images=300, reference=2000, networks=NETWORKS, concepts=60, cases=24
    )
    if small:
        config.sample.steps = 2
        config.eval.update(measures=("distances",), images=20, reference=20, networks=("pixels",))
    return config


def guidance(runs: Runs, axes: plt.Axes) -> None:
    """Guidance against precision, diversity and distance, of the demo weights."""
    plain = [(f"{scale:g}", {"guidance": scale}) for scale in (SCALES[1:2] if runs.small else SCALES)]
    special = [
        ("5, sigma / alpha in (0.3, 5]", {"guidance": 5.0, "guidance_interval": (0.3, 5.0)}),
        ("8, rescaled 0.7", {"guidance": 8.0, "rescale": 0.7}),
    ]
    configs = {}
    for label, changed in plain if runs.small else plain + special:
        configs[label] = demo_config(runs.small)
        configs[label].eval.measures = ("distances",)
        configs[label].sample.update(changed)
    reports = _of_demo("guidance", "guidance", configs, runs)
    network = NETWORKS[0] if not runs.small else "pixels"
    for label, report in reports.items():
        precision, recall, *_ = overlap(figures(report, network))
        axes.plot(recall, precision, "o", color="C0")
        axes.annotate(label, (recall, precision), (4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.2)
    axes.set(xlabel=f"recall, {network}", ylabel=f"precision, {network}")


def fast(runs: Runs, axes: plt.Axes) -> None:
    """The student of the demo weights at few network calls, and the demo weights at more."""
    configs = {}
    for steps in CALLS[:1] if runs.small else CALLS:
        configs[f"fast, {steps}"] = demo_config(runs.small, "fast")
        configs[f"fast, {steps}"].sample.steps = steps
    for solver, steps in (("dpmpp_2m", 4), ("dpmpp_2m", 20), ("ddim", 50)):
        config = configs[f"demo, {solver}, {steps} with guidance"] = demo_config(runs.small)
        config.sample.update(solver=solver, steps=1 if runs.small else steps)
    reports = _of_demo("fast", "model, steps", configs, runs)
    if not runs.small:
        for label, report in reports.items():
            axes.bar(label, next(_right(report["scenes"])))
        axes.tick_params(axis="x", labelrotation=60, labelsize=7)
        axes.set_ylabel("names right")


def _of_demo(name: str, head: str, configs: dict[str, ConfigDict], runs: Runs) -> dict[str, Report]:
    """The reports of these configs of the embedded model, which are printed."""
    reports, rows = {}, []
    for label, config in configs.items():
        report = reports[label] = runs.measured(f"{name}/{label.translate(dict.fromkeys(map(ord, ' /,')))}", config, "")
        network = config.eval.networks[0]
        value, error = ratio(report, network)
        measures = (*overlap(figures(report, network)), *_right(report["scenes"]))
        rows.append((label, f"{value:.3g} ± {error:.2g}", *(f"{measure:.2f}" for measure in measures)))
    scene_columns = ("names right", "held-out colour and object right")[: len(rows[0]) - 2 - len(OVERLAP)]
    table((head, f"ratio, {network}", *OVERLAP, *scene_columns), rows)
    return reports


def _right(scenes: dict | None) -> Iterator[float]:
    for kinds in (scenes or {}).values():
        yield kinds["names"]["generated"]["object"]["mean"]
        yield kinds["held-out colours"]["generated"]["both"]["mean"]


def latents(runs: Runs, axes: plt.Axes) -> None:
    """The denoiser of latents and the same network on pixels, trained as many seconds."""
    rows = []
    for label, pixels in (("latents", False), ("pixels", True)):
        config = demo_config(runs.small, "small")
        config.weights = ""
        config.eval.update(measures=("distances",), images=150)
        if pixels:
            config.autoencoder.kind = "identity"
            config.model.update(in_channels=3, out_channels=3)
        if runs.small:
            config.data.size, config.data.splits.train = 32, "drawings[:60]"
            config.model.update(block_out_channels=(16, 16, 16))
        name = f"latents/{label}"
        seconds = runs.seconds_per_step(name, config, 2 if runs.small else 20)
        steps = 2 if runs.small else max(int(TRAINING / seconds), 1)
        config.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
        report = runs.measured(name, config)
        network = config.eval.networks[0]
        model = build.model.diffusion_model(config)
        value, error = ratio(report, network)
        coverage = figures(report, network)["coverage"]["generated"]["mean"]
        rows.append(
            (
                label,
                str(np.prod(model.shape)),
                f"{_flops(model) / 1e9:.3g}",
                f"{seconds:.3g}",
                str(steps),
                f"{value:.3g} ± {error:.2g}",
                f"{coverage:.2f}",
            )
        )
        axes.bar(label, value)
    axes.set_ylabel(f"Frechet ratio, {network}")
    cost = ("values of a picture", "GFLOP of a call", "seconds a step", f"steps in {TRAINING} s")
    table(("space", *cost, f"ratio, {network}", f"coverage, {network}"), rows)


def _flops(model: DiffusionModel) -> float:
    """Of one call of the network for one picture, by XLA."""
    x = jnp.zeros((1, *model.shape))
    cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model.conditioning.null)
    compiled = jax.jit(model.network.apply).lower(model.params, x, jnp.zeros(1), cond).compile()
    return compiled.cost_analysis()["flops"]
