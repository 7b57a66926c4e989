"""--mode=eval: measure the likelihood of held-out data."""

from pathlib import Path

import jax
from absl import logging
from ml_collections import ConfigDict

from diffusion_jax.app import build, weights
from diffusion_jax.app.agreement import check_condition
from diffusion_jax.app.workdir import make_writable
from diffusion_jax.data.transforms import crop
from diffusion_jax.evaluation.likelihood import check_section, evaluate_likelihood
from diffusion_jax.messages import as_json


def run(config: ConfigDict, workdir: Path) -> None:
    """Measure the likelihood of held-out data with the settings of config.eval. Results go to workdir/eval.json."""
    if jax.process_count() > 1:
        raise ValueError("evaluation runs on one host: leave out --distributed")
    if not build.has_denoiser(config):
        raise ValueError("--mode=eval measures a denoiser, and this config has only a first stage")
    model = build.model(config)
    check_section(config.eval, model.schedule)
    source = build.source(config, "validation", model.size[0])
    check_condition(config, source)
    model, origin = weights.load(config, workdir, model)
    make_writable(workdir)
    logging.info("weights: %s", origin)
    report = evaluate_likelihood(model, source, crop(*model.size, upscale=config.data.upscale), config.eval)
    (workdir / "eval.json").write_text(as_json({"weights": origin} | report, indent=2) + "\n")
    logging.info(
        "flow %.4f, bound %.4f %s of the %s of %d images of %s; wrote %s",
        *(report["flow"]["mean"], report["bound"]["mean"], report["unit"], report["of"], report["images"]),
        *(report["data"], workdir / "eval.json"),
    )
