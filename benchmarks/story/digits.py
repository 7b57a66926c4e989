"""Class-conditional digits, trained in a minute each."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from ml_collections import ConfigDict

from benchmarks import adversarial
from benchmarks.story.runs import OVERLAP, Report, Runs, figures, overlap, ratio, spread, table
from configs import digits, few_step
from diffusion_jax import build
from diffusion_jax.app import distances
from diffusion_jax.messages import as_json

SEEDS = 3
TRAINING = 500  # steps
NETWORKS = ("pixels", "alexnet")
OBJECTIVES = {  # schedule, prediction
    "linear, eps": ("linear", "eps"),
    "linear, v": ("linear", "v"),
    "cosine, eps": ("cosine", "eps"),
    "cosine, x0": ("cosine", "x0"),
    "cosine, v": ("cosine", "v"),
    "flow": ("flow", "flow"),
    "edm": ("edm", "edm"),
}
LONGER = (1, 4)  # seconds of the GAN, over those of diffusion
SOLVERS = {  # solver -> steps
    "ddpm": (10, 20, 50, 100, 1000),
    "ddim": (5, 10, 20, 50, 100),
    "dpmpp_2m": (5, 10, 15, 20, 30),
    "unipc": (5, 10, 15, 20, 30),
    "heun": (5, 10, 20),
}
CALLS = {"heun": lambda steps: 2 * steps - 1}  # network calls of a plan, where these are not its steps
LADDER = (1, 2, 4, 8)  # network calls
TEACHER = {"ddim": (*LADDER, 50), "dpmpp_2m": (20,)}  # solver -> steps, of the teacher in `ladder`


def digits_config(small: bool, seed: int = 0, networks: tuple[str, ...] = NETWORKS) -> ConfigDict:
    """Class-conditional digits without guidance, measured against half of the training data."""
    config = digits.get_config()
    config.seed = seed
    config.train.update(steps=TRAINING, checkpoint_every=TRAINING, snapshot_every=TRAINING)
    config.sample.update(guidance=1.0, batch_size=200)
    config.eval.update(measures=("distances",), split="train", images=800, reference=0, networks=networks, seed=seed)
    if small:
        config.train.update(steps=2, batch_size=8)
        config.model.update(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
        config.sample.steps = 2
        config.eval.update(images=20, reference=20, networks=("pixels",))
    return config


def objectives(runs: Runs, axes: plt.Axes) -> None:
    """Schedule, prediction and weight of the loss."""
    rows, seeds = [], range(1 if runs.small else SEEDS)
    settings = dict(list(OBJECTIVES.items())[-1:]) if runs.small else OBJECTIVES
    for label, (schedule, prediction) in settings.items():
        for weight in ("uniform", "min_snr"):
            reports = []
            for seed in seeds:
                config = digits_config(runs.small, seed)
                config.schedule.name = schedule
                config.objective.update(prediction=prediction, weight=weight)
                if prediction == "edm":
                    config.objective.levels = "lognormal"
                reports.append(runs.measured(f"objectives/{schedule}_{prediction}_{weight}_{seed}", config))
            networks = config.eval.networks
            ratios = {network: [ratio(report, network)[0] for report in reports] for network in networks}
            coverage = [figures(report, networks[0])["coverage"]["generated"]["mean"] for report in reports]
            rows.append((label, weight, *(spread(values) for values in ratios.values()), spread(coverage)))
            axes.errorbar(
                f"{label}\n{weight}", np.mean(ratios[networks[0]]), np.std(ratios[networks[0]]), fmt="o", color="C0"
            )
    axes.set_ylabel(f"Frechet ratio, {networks[0]}")
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)
    table(
        ("schedule, prediction", "weight", *(f"ratio, {name}" for name in networks), f"coverage, {networks[0]}"), rows
    )


def seeds(runs: Runs, axes: plt.Axes) -> None:
    """The spread over seeds of training."""
    rows, count = [], 2 if runs.small else 10
    reports = []
    for seed in range(count):
        config = digits_config(runs.small, seed)
        reports.append(runs.measured(f"seeds/{seed}", config))
    for network in config.eval.networks:
        values = [ratio(report, network)[0] for report in reports]
        rows.append((network, str(count), spread(values), f"{min(values):.3g}", f"{max(values):.3g}"))
        axes.plot(values, "o", label=network)
    axes.set(xlabel="seed", ylabel="Frechet ratio", ylim=(0, None))
    axes.legend()
    table(("features", "runs that ended", "ratio", "least", "most"), rows)


def solvers(runs: Runs, axes: plt.Axes) -> None:
    """Solver and number of network calls, of the first model of `seeds`."""
    rows, network = [], "pixels"
    runs.measured("seeds/0", digits_config(runs.small))
    for solver, all_steps in SOLVERS.items():
        line = []
        for steps in all_steps[:1] if runs.small else all_steps:
            config = digits_config(runs.small)
            config.sample.update(solver=solver, steps=steps)
            report = runs.measured(f"solvers/{solver}_{steps}", config, of="seeds/0")
            calls = CALLS.get(solver, lambda steps: steps)(steps)
            parts = [ratio(report, name) for name in config.eval.networks]
            rows.append((solver, str(steps), str(calls), *(f"{value:.3g} ± {error:.2g}" for value, error in parts)))
            line.append((calls, *parts[0]))
        axes.errorbar(*zip(*line, strict=True), marker="o", capsize=2, label=solver)
    axes.set(xlabel="network calls", ylabel=f"Frechet ratio, {network}", xscale="log", yscale="log")
    axes.legend()
    table(("solver", "steps", "network calls", *(f"ratio, {name}" for name in config.eval.networks)), rows)


def gan(runs: Runs, axes: plt.Axes) -> None:
    """Diffusion and a GAN of as many weights, trained as many seconds and more."""
    reports_of: dict[str, list[Report]] = {}
    for seed in range(1 if runs.small else SEEDS):
        config = digits_config(runs.small, seed)
        reports_of.setdefault("diffusion", []).append(runs.measured(f"seeds/{seed}", config))
        seconds = runs.seconds_per_step(f"gan/timed_{seed}", config, 2 if runs.small else 100) * config.train.steps
        for times in LONGER[:1] if runs.small else LONGER:
            report = runs.folder / f"gan/{times}_{seed}.json"
            if not report.exists():
                report.write_text(as_json(_of_gan(config, seconds * times, report.with_suffix(""))))
            reports_of.setdefault(f"GAN, {times} times as long", []).append(json.loads(report.read_text()))
    rows, network = [], config.eval.networks[0]
    for label, reports in reports_of.items():
        measures = np.array([overlap(figures(each_report, network)) for each_report in reports]).T
        rows.append(
            (label, spread([ratio(each_report, network)[0] for each_report in reports]), *map(spread, measures))
        )
        axes.errorbar(OVERLAP, measures.mean(axis=1), measures.std(axis=1), fmt="o", label=label)
    axes.set_ylim(0, None)
    axes.legend()
    table(("model", f"ratio, {network}", *OVERLAP), rows)


def _of_gan(config: ConfigDict, seconds: float, workdir: Path) -> Report:
    config = config.copy_and_resolve_references()
    config.objective.prediction = "x0"
    config.sample.update(solver="ddim", steps=1)
    model = adversarial.trained(config, build.model.diffusion_model(config), seconds)
    return distances.distances(config, model)(model, workdir.parent / "cache")(model, workdir)


def ladder(runs: Runs, axes: plt.Axes) -> None:
    """Each method of few steps at 1 to 8 network calls, its teacher, the models of `seeds`, at more."""
    reports_of: dict[str, dict[int, list[Report]]] = {}
    methods = [name for name in few_step.METHODS if name not in ("guidance", *few_step.FREE_SCALES)]
    for seed in range(1 if runs.small else SEEDS):
        teacher = f"seeds/{seed}"
        runs.measured(teacher, digits_config(runs.small, seed))
        for solver, calls in {"ddim": (1,)}.items() if runs.small else TEACHER.items():
            for steps in calls:
                config = digits_config(runs.small, seed, networks=NETWORKS[:1])
                config.sample.update(solver=solver, steps=steps)
                report = runs.measured(f"ladder/{solver}_{steps}_{seed}", config, of=teacher)
                reports_of.setdefault(f"teacher, {solver}", {}).setdefault(steps, []).append(report)
        for method in methods[-1:] if runs.small else methods:
            stages = LADDER[::-1] if method == "distillation" else (None,)
            learned_from = teacher
            for segments in stages:
                student = f"ladder/{method}_{segments or 'all'}_{seed}"
                for steps in (segments,) if segments else LADDER[:1] if runs.small else LADDER:
                    config = _student(runs, seed, method, learned_from, len(stages))
                    config.objective.segments = segments or config.objective.segments
                    config.sample.steps = steps
                    first = segments or steps == LADDER[0]
                    report = runs.measured(
                        student if first else f"{student}_{steps}", config, None if first else student
                    )
                    reports_of.setdefault(method, {}).setdefault(steps, []).append(report)
                learned_from = student
    rows, network = [], config.eval.networks[0]
    axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for name, points in reports_of.items():
        values = {n: [ratio(each_report, network)[0] for each_report in points[n]] for n in sorted(points)}
        more = (f"{n} calls: {spread(of_calls)}" for n, of_calls in values.items() if n not in LADDER)
        rows.append((name, *(spread(values[n]) if n in values else "" for n in LADDER), ", ".join(more)))
        axes.plot(values.keys(), [np.mean(of_calls) for of_calls in values.values()], "o-", label=name)
    axes.set(xlabel="network calls", ylabel=f"Frechet ratio, {network}", xscale="log", yscale="log")
    axes.legend(fontsize=6)
    table((f"method: ratio, {network}", *(f"{n} calls" if n > 1 else "1 call" for n in LADDER), "more"), rows)


def _student(runs: Runs, seed: int, method: str, teacher: str, stages: int) -> ConfigDict:
    """A student of digits that learns without guidance, as long as its teacher in all stages together."""
    config, changed = digits_config(runs.small, seed, networks=NETWORKS[:1]), few_step.get_config(f"digits/{method}")
    config.teacher = str(runs.folder / teacher)
    config.model.target_embedding = changed.model.target_embedding
    config.objective = changed.objective
    config.objective.scale = 1.0
    config.optimizer = changed.optimizer
    config.sample.solver = changed.sample.solver
    steps = -(-config.train.steps // stages)
    config.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
    return config
