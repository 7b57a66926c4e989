"""--mode=eval: measure a model on held-out data."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax.app import build, first_stage, pictures, sample, weights
from diffusion_jax.app.agreement import check_condition, condition_kind
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.data import sources
from diffusion_jax.data.transforms import crop
from diffusion_jax.evaluation.likelihood import check_section, evaluate_likelihood
from diffusion_jax.evaluation.retrieval import classifier_features
from diffusion_jax.evaluation.scenes import Known, Trial, evaluate_scenes, known, trials
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.messages import as_json
from diffusion_jax.model import DiffusionModel

SHOWN, COLUMNS = 48, 8  # pictures on the sheet of a kind of scenes


def run(config: ConfigDict, workdir: Path) -> None:
    """Measure config.eval.measures; of a first stage alone, its reconstructions. Results go to workdir/eval.json."""
    if jax.process_count() > 1:
        raise ValueError("evaluation runs on one host: leave out --distributed")
    report = _of_model(config, workdir) if build.has_denoiser(config) else _of_first_stage(config, workdir)
    (workdir / "eval.json").write_text(as_json(report, indent=2) + "\n")
    logging.info("wrote %s", workdir / "eval.json")


def _of_first_stage(config: ConfigDict, workdir: Path) -> dict:
    report = first_stage.evaluate(config, workdir)
    logging.info("PSNR %.2f dB, LPIPS %.4f", report["psnr"]["mean"], report["lpips"]["mean"])
    return {"weights": str(workdir), "reconstruction": report}


def _of_model(config: ConfigDict, workdir: Path) -> dict:
    unknown = [name for name in config.eval.measures if name not in MEASURES]
    if unknown or not config.eval.measures:
        got = f"got {unknown[0]!r}" if unknown else "got none"
        raise ValueError(f"eval.measures must be some of {', '.join(MEASURES)}; {got}")
    config = weights.resolved(config, workdir)
    model = build.model(config)
    ready = {name: MEASURES[name](config, model) for name in config.eval.measures}
    model, origin = weights.load(config, workdir, model)
    make_writable(workdir)
    logging.info("weights: %s", origin)
    return {"weights": origin} | {name: measure(model, workdir) for name, measure in ready.items()}


def _likelihood(config: ConfigDict, model: DiffusionModel):
    check_section(config.eval, model.schedule)
    source = build.source(config, "validation", model.size[0])
    check_condition(config, source)

    def measure(model: DiffusionModel, workdir: Path) -> dict:
        report = evaluate_likelihood(model, source, crop(*model.size, upscale=config.data.upscale), config.eval)
        logging.info(
            "flow %.4f, bound %.4f %s of the %s of %d images of %s",
            *(report["flow"]["mean"], report["bound"]["mean"], report["unit"], report["of"], report["images"]),
            report["data"],
        )
        return report

    return measure


def _scenes(config: ConfigDict, model: DiffusionModel):
    if config.data.source != "emoji" or condition_kind(config) != "text":
        raise ValueError("eval.measures=scenes needs a text-conditional model and data.source=emoji")
    distances, features = load_lpips(), classifier_features(load_lpips(config.eval.network))
    drawings = sources.emoji_drawings(config.data.data_dir or None, config.data.styles)
    chosen = sources.emoji_drawings(config.data.data_dir or None, config.data.styles, config.data.concepts)
    sample.request(config, model, config.sample.prompts)  # raises for settings that cannot be used

    def measure(model: DiffusionModel, workdir: Path) -> dict:
        compared = known(drawings, features, model.size[0])
        asked = trials(model, compared, chosen, config.eval)
        scales = config.eval.scales or (config.sample.guidance,)
        return {f"guidance {scale:g}": at_scale(scale, model, asked, compared, workdir) for scale in scales}

    def at_scale(scale: float, model: DiffusionModel, asked: Sequence[Trial], compared: Known, workdir: Path) -> dict:
        folder = workdir / "eval" / f"guidance_{scale:g}"
        folder.mkdir(parents=True, exist_ok=True)

        def generate(prompts: Sequence[str], seeds: Sequence[int]) -> Iterator[np.ndarray]:
            request = sample.request(config, model, prompts)
            request = request._replace(jobs=list(enumerate(seeds)), guidance=request.guidance._replace(scale=scale))
            return (one.image for one in sample.generate(request, model, config.sample.batch_size, progress=True))

        def show(kind: str, captions: Sequence[str], images: Sequence[np.ndarray]) -> None:
            sheet = pictures.grid(images[:SHOWN], COLUMNS, captions[:SHOWN])
            pictures.save(folder / f"{kind.replace(' ', '_')}.png", sheet, {"config": config.to_json_best_effort()})

        report = evaluate_scenes(asked, compared, generate, distances, config.eval.seed, show)
        for kind, of_kind in report.items():
            made, painted = (of_kind[which]["both"]["mean"] for which in ("generated", "painted"))
            part = f"object and {of_kind['part']} right"
            logging.info("guidance %g, %s: %s in %.3f of the pictures, painted %.3f", scale, kind, part, made, painted)
        return report

    return measure


MEASURES = {"likelihood": _likelihood, "scenes": _scenes}  # each checks the config, and returns what measures a model
