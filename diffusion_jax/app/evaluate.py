"""--mode=eval: measure a model on held-out data."""

import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax import build, parallel, paths, pictures
from diffusion_jax.app import first_stage, sample
from diffusion_jax.app.distances import distances
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.build import weights
from diffusion_jax.build.agreement import condition_kind
from diffusion_jax.build.records import check_condition
from diffusion_jax.data import sources
from diffusion_jax.data.crops import crop
from diffusion_jax.evaluation import report as report_page
from diffusion_jax.evaluation.likelihood import check_section, evaluate_likelihood
from diffusion_jax.evaluation.retrieval import classifier_features
from diffusion_jax.evaluation.scenes import KnownDrawings, Trial, evaluate_scenes, known_drawings, trials
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.messages import as_json
from diffusion_jax.model import DiffusionModel
from diffusion_jax.paths import Path
from diffusion_jax.training import averages

LEVELS = 3  # of folders in a report: itself, averages, guidance scales
SHOWN, COLUMNS = 48, 8  # pictures on the sheet of a kind of scenes

Measure = Callable[[DiffusionModel, Path], dict]  # a model, a folder for its pictures -> its report
Prepare = Callable[[DiffusionModel, Path], Measure]  # a model with weights, a folder for caches -> its measure


def run(config: ConfigDict, workdir: Path) -> None:
    """Measure config.eval.measures; of a first stage alone, its reconstructions.

    workdir/eval gets report.json, sheets of pictures, and report.html with all of these, beside those of
    config.eval.beside.
    """
    other_reports = [paths.fetched(paths.at(other) / "eval", LEVELS) for other in config.eval.beside]
    report_page.page(other_reports)  # raises for a work directory without a report
    measure = _of_model if build.model.has_denoiser(config) else _of_first_stage
    with tempfile.TemporaryDirectory() as name:
        temporary = pathlib.Path(name)
        report = measure(config, workdir, temporary)
        if parallel.is_main():
            folder = workdir / "eval"
            (temporary / "report.json").write_text(as_json(report, indent=2) + "\n")
            (temporary / "report.html").write_text(report_page.page([temporary, *other_reports]), encoding="utf-8")
            paths.replace_folder(folder, temporary)
            logging.info("wrote %s", folder / "report.html")


def _of_first_stage(config: ConfigDict, workdir: Path, folder: Path) -> dict:
    report = first_stage.evaluate(config, workdir)
    logging.info(
        "reconstructions: PSNR %.2f dB (higher is better), LPIPS %.4f (lower is better)",
        report["psnr"]["mean"],
        report["lpips"]["mean"],
    )
    return {"weights": str(workdir), "reconstruction": report}


def _of_model(config: ConfigDict, workdir: Path, folder: Path) -> dict:
    unknown = [name for name in config.eval.measures if name not in MEASURES]
    if unknown or not config.eval.measures:
        got = f"got {unknown[0]!r}" if unknown else "got none"
        raise ValueError(f"eval.measures must be some of {', '.join(MEASURES)}; {got}")
    config = weights.resolved(config, workdir)
    untrained = build.model.diffusion_model(config)
    cache = build.data.cache_folder(config.data, workdir)
    preparations = {name: MEASURES[name](config, untrained) for name in config.eval.measures}
    points = _points(config.eval, workdir)
    model, origin = weights.load(config, workdir, untrained)
    base_params = weights.updated(config, untrained).params if points else None
    make_writable(workdir)
    logging.info("weights: %s", origin)
    report: dict = {"weights": origin}
    for name, prepare in preparations.items():
        measure = prepare(model, cache)
        report[name] = {} if points else measure(model, folder)
        for label, (step, length) in points.items():
            logging.info("%s", label)
            at_point = model._replace(params=weights.averaged(config, workdir, untrained, base_params, step, length))
            report[name][label] = measure(at_point, folder / label.replace(" ", "_"))
    return report


def _points(section: ConfigDict, workdir: Path) -> dict[str, tuple[int, float]]:
    """The steps and lengths of the averages to measure, by label. None to measure the newest checkpoint."""
    if not section.averages:
        if section.along:
            raise ValueError(
                "eval.along measures one average along the run: give its length, --config.eval.averages=0.1"
            )
        return {}
    steps = averages.steps(workdir / "averages")
    if not steps:
        raise FileNotFoundError(f"no averages in {workdir / 'averages'}: train with --config.train.post_hoc")
    if not section.along:
        points = {f"average {length:g}": (steps[-1], length) for length in section.averages}
    elif len(section.averages) > 1:
        raise ValueError(f"eval.along measures one average along the run, got eval.averages={tuple(section.averages)}")
    else:
        return _along(workdir / "averages", steps, section.averages[0])
    for step, length in points.values():
        averages.factors(workdir / "averages", step, length)  # raises for what cannot be made
    return points


def _along(folder: Path, steps: Sequence[int], length: float) -> dict[str, tuple[int, float]]:
    """The steps whose averages of a length can be made, as `_points`: the first ones have few saved averages before
    them. Logs those that are left out. Raises ValueError if it can be made at no step.
    """
    errors: dict[int, ValueError] = {}
    for step in steps:
        try:
            averages.factors(folder, step, length)
        except ValueError as error:
            errors[step] = error
    if len(errors) == len(steps):
        raise errors[steps[-1]]
    if errors:
        names, first = ", ".join(map(str, errors)), next(iter(errors.values()))
        logging.warning("eval.along leaves out %d of %d steps (%s): %s", len(errors), len(steps), names, first)
    return {f"step {step}": (step, length) for step in steps if step not in errors}


def _likelihood(config: ConfigDict, model: DiffusionModel) -> Prepare:
    check_section(config.eval, model.schedule)
    source = build.data.source(config, "validation", max(model.size))
    check_condition(model.conditioning.null, source)

    def measure(model: DiffusionModel, folder: Path) -> dict:
        report = evaluate_likelihood(model, source, crop(*model.size, upscale=config.data.upscale), config.eval)
        logging.info(
            "flow %.4f, bound %.4f %s of the %s of %d images of %s: their negative log-likelihood, along the "
            "probability flow and by the variational bound; lower is better (docs/likelihood.md)",
            *(report["flow"]["mean"], report["bound"]["mean"], report["unit"], report["of"], report["images"]),
            report["data"],
        )
        return report

    return lambda model, cache: measure


def _scenes(config: ConfigDict, model: DiffusionModel) -> Prepare:
    if config.data.source != "emoji" or condition_kind(model.conditioning.null) != "text":
        raise ValueError("eval.measures=scenes needs a text-conditional model and data.source=emoji")
    lpips, features = load_lpips(), classifier_features(load_lpips(config.eval.network))
    data_dir = build.data.data_folder(config.data)
    drawings = sources.emoji_drawings(data_dir, config.data.styles)
    target_drawings = sources.emoji_drawings(data_dir, config.data.styles, config.data.concepts)
    scales = sample.measured_scales(config, model, config.sample.prompts)

    def prepare(model: DiffusionModel, cache: Path) -> Measure:
        reference = known_drawings(drawings, features, model.size[0])
        scene_trials = trials(model, reference, target_drawings, config.eval)

        def measure(model: DiffusionModel, folder: Path) -> dict:
            return {f"guidance {scale:g}": at_scale(scale, model, scene_trials, reference, folder) for scale in scales}

        return measure

    def at_scale(
        scale: float, model: DiffusionModel, scene_trials: Sequence[Trial], reference: KnownDrawings, folder: Path
    ) -> dict:
        folder = folder / f"guidance_{scale:g}"
        folder.mkdir(parents=True, exist_ok=True)

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
            return sample.generate_pictures(config, model, prompts, seeds, scale)

        def show(kind: str, captions: Sequence[str], images: Sequence[np.ndarray]) -> None:
            sheet = pictures.grid(sample.with_held_back(model, images[:SHOWN]), COLUMNS, captions[:SHOWN])
            pictures.save(folder / f"{kind.replace(' ', '_')}.png", sheet, {"config": config.to_json_best_effort()})

        report = evaluate_scenes(scene_trials, reference, generate, lpips, config.eval.seed, show)
        for kind, of_kind in report.items():
            generated, painted = (of_kind[source]["both"]["mean"] for source in ("generated", "painted"))
            part = f"object and {of_kind['part']} right"
            logging.info(
                "guidance %g, %s: %s in %.3f of the pictures, painted %.3f", scale, kind, part, generated, painted
            )
        return report

    return prepare


# each checks the config and returns a function that prepares the measurement
MEASURES = {"likelihood": _likelihood, "distances": distances, "scenes": _scenes}
