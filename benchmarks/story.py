"""What each choice in diffusion does, measured: one table and one plot for each command.

    python -m benchmarks.story objectives     # schedule, prediction and weight of the loss: digits, three seeds
    python -m benchmarks.story seeds          # ten seeds of training: digits
    python -m benchmarks.story solvers        # solver and steps: digits
    python -m benchmarks.story guidance       # guidance scale, in an interval, rescaled: the demo weights
    python -m benchmarks.story latents        # latents against pixels, as many seconds of training: emoji
    python -m benchmarks.story gan            # coverage, against a GAN of as many weights, as many seconds: digits
    python -m benchmarks.story ladder         # methods of few steps, beside their teacher: digits, three seeds
    python -m benchmarks.story fast           # the student of the demo at few network calls, beside the demo weights

Each trains and measures what it needs in runs/story, where a second call finds it again; prints a table in Markdown,
and draws docs/story_TABLE.png. Distances are Frechet distances over those of as many held-out pictures; +- is the
standard deviation over seeds, or with one seed the standard error. AlexNet's features of digits enlarged 28 times say
little by themselves, so digits are measured in their pixels too.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import logging
from ml_collections import ConfigDict, FrozenConfigDict

from benchmarks import adversarial, quick
from configs import digits, few_step, latent_cfg
from diffusion_jax.app import build, distances, evaluate, fields, train
from diffusion_jax.compilation import configure
from diffusion_jax.messages import as_json
from diffusion_jax.model import DiffusionModel

FOLDER = Path("runs") / "story"
SEEDS = 3
DIGITS, EMOJI = ("pixels", "alexnet"), ("vgg16", "alexnet")
OBJECTIVES = {  # schedule, prediction
    "linear, eps": ("linear", "eps"),
    "linear, v": ("linear", "v"),
    "cosine, eps": ("cosine", "eps"),
    "cosine, x0": ("cosine", "x0"),
    "cosine, v": ("cosine", "v"),
    "flow": ("flow", "flow"),
    "edm": ("edm", "edm"),
}
SOLVERS = {  # solver -> steps
    "ddpm": (10, 20, 50, 100, 1000),
    "ddim": (5, 10, 20, 50, 100),
    "dpmpp_2m": (5, 10, 15, 20, 30),
    "unipc": (5, 10, 15, 20, 30),
    "heun": (5, 10, 20),
}
CALLS = {"heun": lambda steps: 2 * steps - 1}  # network calls of a plan, where these are not its steps
SCALES = (1.0, 2.0, 3.0, 5.0, 8.0, 15.0)
OVERLAP = ("precision", "recall", "density", "coverage")
TRAINING = 300  # seconds of training in `latents`
LADDER = (1, 2, 4, 8)  # network calls
TEACHER = {"ddim": (*LADDER, 50), "dpmpp_2m": (20,), "ddpm": (1000,)}  # solver -> steps, of the teacher in `ladder`
Report = dict


def digits_config(small: bool, seed: int = 0, steps: int = 500) -> ConfigDict:
    """Class-conditional digits without guidance, measured against half of the training data."""
    config = digits.get_config()
    config.seed = seed
    config.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
    config.sample.update(guidance=1.0, batch_size=200)
    config.eval.update(measures=("distances",), split="train", images=800, reference=0, networks=DIGITS, seed=seed)
    if small:
        config.train.update(steps=2, batch_size=8)
        config.model.update(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
        config.sample.steps = 2
        config.eval.update(images=20, reference=20, networks=("pixels",))
    return config


def emoji_config(small: bool, preset: str = "full") -> ConfigDict:
    """The demo weights, or their student, `fast`."""
    config = latent_cfg.get_config(preset)
    config.sample.batch_size = 64
    config.eval.update(
        measures=("distances", "scenes"), images=300, reference=2000, networks=EMOJI, concepts=60, cases=24
    )
    if small:
        config.sample.steps = 2
        config.eval.update(measures=("distances",), images=20, reference=20, networks=("pixels",))
    return config


def measured(name: str, config: ConfigDict, trained: str | None = None) -> Report:
    """The report of a config: trained in its folder, or with the weights of another run. "" is the demo weights."""
    workdir = FOLDER / name
    report = workdir / "eval" / "report.json"
    if not report.exists():
        fields.check(config)
        frozen = FrozenConfigDict(config)
        _shared(workdir / "cache", FOLDER / "cache")
        if trained is None:
            train.run(frozen, workdir)
        elif trained:
            _shared(workdir / "checkpoints", FOLDER / trained / "checkpoints")
        evaluate.run(frozen, workdir)
    return json.loads(report.read_text())["distances"] | {"scenes": json.loads(report.read_text()).get("scenes")}


def _shared(folder: Path, target: Path) -> None:
    """A folder of a run that is that of others."""
    if not folder.exists():
        target.mkdir(parents=True, exist_ok=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(target.resolve())


def figures(report: Report, network: str) -> dict[str, dict]:
    """The figures in a network's features, of the only guidance scale."""
    (at_scale,) = [part for key, part in report.items() if key.startswith("guidance")]
    return at_scale[network]


def ratio(report: Report, network: str) -> tuple[float, float]:
    found = figures(report, network)["frechet"]
    return found["ratio"]["value"], found["ratio"]["standard_error"]


def spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3g}" + (f" ± {np.std(values, ddof=1):.2g}" if len(values) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def objectives(small: bool, axes: plt.Axes) -> None:
    """Schedule, prediction and weight of the loss."""
    rows, seeds = [], range(1 if small else SEEDS)
    chosen = dict(list(OBJECTIVES.items())[-1:]) if small else OBJECTIVES
    for label, (schedule, prediction) in chosen.items():
        for weight in ("uniform", "min_snr"):
            reports = []
            for seed in seeds:
                config = digits_config(small, seed)
                config.schedule.name = schedule
                config.objective.update(prediction=prediction, weight=weight)
                if prediction == "edm":
                    config.objective.levels = "lognormal"
                reports.append(measured(f"objectives/{schedule}_{prediction}_{weight}_{seed}", config))
            networks = config.eval.networks
            found = {network: [ratio(one, network)[0] for one in reports] for network in networks}
            coverage = [figures(one, networks[0])["coverage"]["generated"]["mean"] for one in reports]
            rows.append((label, weight, *(spread(values) for values in found.values()), spread(coverage)))
            axes.errorbar(
                f"{label}\n{weight}", np.mean(found[networks[0]]), np.std(found[networks[0]]), fmt="o", color="C0"
            )
    axes.set_ylabel(f"Frechet ratio, {networks[0]}")
    axes.tick_params(axis="x", labelrotation=60, labelsize=7)
    table(
        ("schedule, prediction", "weight", *(f"ratio, {name}" for name in networks), f"coverage, {networks[0]}"), rows
    )


def seeds(small: bool, axes: plt.Axes) -> None:
    """The spread over seeds of training."""
    rows, count = [], 2 if small else 10
    reports = []
    for seed in range(count):
        config = digits_config(small, seed)
        reports.append(measured(f"seeds/{seed}", config))
    for network in config.eval.networks:
        values = [ratio(one, network)[0] for one in reports]
        rows.append((network, str(count), spread(values), f"{min(values):.3g}", f"{max(values):.3g}"))
        axes.plot(values, "o", label=network)
    axes.set(xlabel="seed", ylabel="Frechet ratio", ylim=(0, None))
    axes.legend()
    table(("features", "runs that ended", "ratio", "least", "most"), rows)


def solvers(small: bool, axes: plt.Axes) -> None:
    """Solver and number of network calls, of the first model of `seeds`."""
    rows, network = [], "pixels"
    measured("seeds/0", digits_config(small))
    for solver, all_steps in SOLVERS.items():
        line = []
        for steps in all_steps[:1] if small else all_steps:
            config = digits_config(small)
            config.sample.update(solver=solver, steps=steps)
            report = measured(f"solvers/{solver}_{steps}", config, trained="seeds/0")
            calls = CALLS.get(solver, lambda steps: steps)(steps)
            parts = [ratio(report, name) for name in config.eval.networks]
            rows.append((solver, str(steps), str(calls), *(f"{value:.3g} ± {error:.2g}" for value, error in parts)))
            line.append((calls, *parts[0]))
        axes.errorbar(*zip(*line, strict=True), marker="o", capsize=2, label=solver)
    axes.set(xlabel="network calls", ylabel=f"Frechet ratio, {network}", xscale="log", yscale="log")
    axes.legend()
    table(("solver", "steps", "network calls", *(f"ratio, {name}" for name in config.eval.networks)), rows)


def guidance(small: bool, axes: plt.Axes) -> None:
    """Guidance against precision, diversity and distance, of the demo weights."""
    plain = [(f"{scale:g}", {"guidance": scale}) for scale in (SCALES[1:2] if small else SCALES)]
    others = [
        ("5, sigma / alpha in (0.3, 5]", {"guidance": 5.0, "guidance_interval": (0.3, 5.0)}),
        ("8, rescaled 0.7", {"guidance": 8.0, "rescale": 0.7}),
    ]
    configs = {}
    for label, changed in plain if small else plain + others:
        configs[label] = emoji_config(small)
        configs[label].eval.measures = ("distances",)
        configs[label].sample.update(changed)
    reports = _of_demo("guidance", "guidance", configs, small)
    network = EMOJI[0] if not small else "pixels"
    for label, report in reports.items():
        precision, recall, *_ = _overlap(figures(report, network))
        axes.plot(recall, precision, "o", color="C0")
        axes.annotate(label, (recall, precision), fontsize=7)
    axes.set(xlabel=f"recall, {network}", ylabel=f"precision, {network}")


def fast(small: bool, axes: plt.Axes) -> None:
    """The student of the demo weights at few network calls, and the demo weights at more."""
    configs = {}
    for steps in LADDER[:1] if small else LADDER[:-1]:
        configs[f"fast, {steps}"] = emoji_config(small, "fast")
        configs[f"fast, {steps}"].sample.steps = steps
    for solver, steps in (("dpmpp_2m", 4), ("dpmpp_2m", 20), ("ddim", 50)):
        config = configs[f"demo, {solver}, {steps} with guidance"] = emoji_config(small)
        config.sample.update(solver=solver, steps=1 if small else steps)
    reports = _of_demo("fast", "model, steps", configs, small)
    if not small:
        for label, report in reports.items():
            axes.bar(label, next(_right(report["scenes"])))
        axes.tick_params(axis="x", labelrotation=60, labelsize=7)
        axes.set_ylabel("names right")


def _of_demo(name: str, head: str, configs: dict[str, ConfigDict], small: bool) -> dict[str, Report]:
    """The reports of these configs of the embedded model, which are printed."""
    reports, rows = {}, []
    for label, config in configs.items():
        report = reports[label] = measured(f"{name}/{label.translate(dict.fromkeys(map(ord, ' /,')))}", config, "")
        network = config.eval.networks[0]
        value, error = ratio(report, network)
        found = (*_overlap(figures(report, network)), *_right(report["scenes"]))
        rows.append((label, f"{value:.3g} ± {error:.2g}", *(f"{one:.2f}" for one in found)))
    asked = ("names right", "held-out colour and object right")[: len(rows[0]) - 2 - len(OVERLAP)]
    table((head, f"ratio, {network}", *OVERLAP, *asked), rows)
    return reports


def _overlap(found: dict[str, dict]) -> list[float]:
    return [found[name]["generated"]["mean"] for name in OVERLAP]


def _right(scenes: dict | None) -> Iterator[float]:
    for kinds in (scenes or {}).values():
        yield kinds["names"]["generated"]["object"]["mean"]
        yield kinds["held-out colours"]["generated"]["both"]["mean"]


def latents(small: bool, axes: plt.Axes) -> None:
    """The denoiser of latents and the same network on pixels, trained as many seconds."""
    rows = []
    for label, pixels in (("latents", False), ("pixels", True)):
        config = emoji_config(small, "small")
        config.weights = ""
        config.eval.update(measures=("distances",), images=150)
        if pixels:
            config.autoencoder.kind = "identity"
            config.model.update(in_channels=3, out_channels=3)
        if small:
            config.data.size, config.data.splits.train = 32, "drawings[:60]"
            config.model.update(block_out_channels=(16, 16, 16))
        name = f"latents/{label}"
        seconds = _seconds_per_step(name, config, 2 if small else 20)
        steps = 2 if small else max(int(TRAINING / seconds), 1)
        config.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
        report = measured(name, config)
        network = config.eval.networks[0]
        model = build.model(config)
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


def _seconds_per_step(name: str, config: ConfigDict, steps: int) -> float:
    """Of steps after the first ones, by a short training."""
    workdir = FOLDER / f"{name}_timed"
    if not (workdir / "metrics.jsonl").exists():
        short = config.copy_and_resolve_references()
        short.train.update(steps=steps, log_every=max(steps // 2, 1), checkpoint_every=steps, snapshot_every=10 * steps)
        train.run(FrozenConfigDict(short), workdir)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return config.train.batch_size / json.loads(lines[-1])["images_per_second"]


def _flops(model: DiffusionModel) -> float:
    """Of one call of the network for one picture, by XLA."""
    x = jnp.zeros((1, *model.shape))
    cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], model.conditioning.null)
    compiled = jax.jit(model.network.apply).lower(model.params, x, jnp.zeros(1), cond).compile()
    return compiled.cost_analysis()["flops"]


def gan(small: bool, axes: plt.Axes) -> None:
    """Diffusion and a GAN of as many weights, trained as many seconds."""
    rows, network = [], "pixels"
    for seed in range(1 if small else SEEDS):
        config = digits_config(small, seed)
        diffusion = measured(f"seeds/{seed}", config)
        rows += [("diffusion", diffusion)]
        report = FOLDER / f"gan/{seed}.json"
        if not report.exists():
            seconds = _seconds_per_step(f"gan/timed_{seed}", config, 2 if small else 100) * config.train.steps
            config.objective.prediction = "x0"
            config.sample.update(solver="ddim", steps=1)
            model = adversarial.trained(config, build.model(config), seconds)
            prepare = distances.distances(config, model)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(as_json(prepare(model, FOLDER / "gan" / "cache")(model, FOLDER / "gan" / str(seed))))
        rows += [("GAN", json.loads(report.read_text()))]
    shown = []
    for label in ("diffusion", "GAN"):
        reports = [report for name, report in rows if name == label]
        measures = np.array([_overlap(figures(one, network)) for one in reports]).T
        shown.append((label, spread([ratio(one, network)[0] for one in reports]), *map(spread, measures)))
        axes.errorbar(OVERLAP, measures.mean(axis=1), measures.std(axis=1), fmt="o", label=label)
    axes.set_ylim(0, None)
    axes.legend()
    table(("model", f"ratio, {network}", *OVERLAP), shown)


def ladder(small: bool, axes: plt.Axes) -> None:
    """Each method of few steps at 1 to 8 network calls, its teacher, the models of `seeds`, at more."""
    found: dict[tuple[str, int], list[Report]] = {}
    methods = [name for name in few_step.METHODS if name not in ("guidance", few_step.FREE_SCALE)]
    for seed in range(1 if small else SEEDS):
        teacher = f"seeds/{seed}"
        measured(teacher, digits_config(small, seed))
        for solver, calls in {"ddim": (1,)}.items() if small else TEACHER.items():
            for steps in calls:
                config = digits_config(small, seed)
                config.sample.update(solver=solver, steps=steps)
                report = measured(f"ladder/{solver}_{steps}_{seed}", config, trained=teacher)
                found.setdefault((solver, steps), []).append(report)
        for method in methods[-1:] if small else methods:
            stages = LADDER[::-1] if method == "distillation" else (None,)
            learned_from = teacher
            for segments in stages:
                student = f"ladder/{method}_{segments or 'all'}_{seed}"
                for steps in (segments,) if segments else LADDER[:1] if small else LADDER:
                    config = _student(small, seed, method, learned_from, len(stages))
                    config.objective.segments = segments or config.objective.segments
                    config.sample.steps = steps
                    first = segments or steps == LADDER[0]
                    report = measured(student if first else f"{student}_{steps}", config, None if first else student)
                    found.setdefault((method, steps), []).append(report)
                learned_from = student
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        points = {calls: reports for (of, calls), reports in found.items() if of == name}
        for network in config.eval.networks:
            values = {n: [ratio(one, network)[0] for one in reports] for n, reports in points.items()}
            rows.append((name, network, *(f"{n}: {spread(of_calls)}" for n, of_calls in values.items())))
            if network == config.eval.networks[0]:
                axes.plot(values.keys(), [np.mean(of_calls) for of_calls in values.values()], "o-", label=name)
    axes.set(xlabel="network calls", ylabel=f"Frechet ratio, {config.eval.networks[0]}", xscale="log", yscale="log")
    axes.legend(fontsize=6)
    width = max(map(len, rows)) - 2
    table(("method", "features", *["calls: ratio"] * width), [(*row, *[""] * (width + 2 - len(row))) for row in rows])


def _student(small: bool, seed: int, method: str, teacher: str, stages: int) -> ConfigDict:
    """A student of digits that learns without guidance, as long as its teacher in all stages together."""
    config, changed = digits_config(small, seed), few_step.get_config(f"digits/{method}")
    config.teacher = str(FOLDER / teacher)
    config.model.target_embedding = changed.model.target_embedding
    config.objective = changed.objective
    config.objective.scale = 1.0
    config.optimizer = changed.optimizer
    config.sample.solver = changed.sample.solver
    steps = -(-config.train.steps // stages)
    config.train.update(steps=steps, checkpoint_every=steps, snapshot_every=steps)
    return config


TABLES: dict[str, Callable[[bool, plt.Axes], None]] = {
    "objectives": objectives,
    "seeds": seeds,
    "solvers": solvers,
    "guidance": guidance,
    "latents": latents,
    "gan": gan,
    "ladder": ladder,
    "fast": fast,
}


def main() -> None:
    global FOLDER
    parser = quick.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    flags = parser.parse_args()
    quick.note(flags.quick)
    logging.set_verbosity(logging.INFO)
    configure(low_memory=False)
    if flags.quick:
        FOLDER = FOLDER.with_name("story_quick")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    TABLES[flags.table](flags.quick, axes)
    figure.savefig(quick.picture(f"story_{flags.table}.png", flags.quick), dpi=100)


if __name__ == "__main__":
    main()
