"""--mode=eval, and the report behind it on a network of one weight."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import codec
from diffusion_jax.conditioning import class_labels
from diffusion_jax.core import parameterization, schedules
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord
from diffusion_jax.evaluation.likelihood import evaluate_likelihood
from diffusion_jax.model import DiffusionModel, Network
from tests import command_line, test_main
from tests.test_main import TINY, finish, start

compiled, trained = test_main.compiled, test_main.trained  # fixtures
PIXELS = codec.identity()


def apply(params, x, t, cond, key=None):
    """x0 = 0.2 (label - 2) + params: each class as bright as it is, when params is 0."""
    return jnp.ones_like(x) * (0.2 * (cond["label"] - 2.0) + params)[:, None, None, None]


def shades(count, bad=()):
    """Noisy images whose label is their brightness."""

    def read(i):
        if i in bad:
            raise BadRecord("torn")
        noise = np.random.default_rng(i).normal(0, 8, (4, 4, 3))
        return {"image": np.uint8(127.5 + 25.5 * (i % 5 - 2) + noise), "label": i % 5}

    return Source("shades", count, read, num_classes=5)


def report(source, params=0.0, codec=PIXELS, **changes):
    section = ConfigDict({"images": 100, "steps": 8, "probes": 1, "terms": 6, "batch_size": 4, "seed": 0} | changes)
    schedule, says = schedules.cosine(20), parameterization.x0
    model = DiffusionModel(Network(apply), jnp.float32(params), schedule, says, codec, class_labels(5), (4, 4))
    found = evaluate_likelihood(model, source, lambda record, rng: record, section)
    json.dumps(found, allow_nan=False)
    return found


def means(found):
    return {name: value["mean"] for name, value in found.items() if isinstance(value, dict)}


def test_the_report_counts_what_it_measured():
    found = report(shades(10, bad=(2, 5)))
    assert (found["images"], found["data"], found["of"], found["unit"]) == (8, "shades", "pixels", "bits/dim")
    assert (found["steps"], found["terms"], found["seed"]) == (8, 6, 0)
    assert report(shades(10), images=6)["images"] == 6
    assert found["flow"]["standard_error"] > 0
    terms = means(found)
    parts = terms["bound_prior"] + terms["bound_diffusion"] + terms["bound_decoder"]
    np.testing.assert_allclose(terms["bound"], parts, rtol=1e-5)
    assert report(shades(1))["flow"]["standard_error"] is None


@pytest.mark.parametrize("side", ["0", "16"])
def test_images_are_measured_in_the_size_of_training(side, tmp_path, capfd, monkeypatch):
    """Whatever the size of what is sampled; and what is not finite is null in the report."""
    sizes = []

    def measured(model, source, transform, section):
        sizes.append((model.size, transform(source[0], np.random.default_rng(0))["image"].shape))
        return {"flow": {"mean": np.nan, "standard_error": np.inf}, "bound": {"mean": -np.inf}} | dict.fromkeys(
            ("unit", "of", "images", "data"), 1
        )

    monkeypatch.setattr("diffusion_jax.app.evaluate.evaluate_likelihood", measured)
    monkeypatch.setattr("diffusion_jax.app.weights.load", lambda config, workdir, model: (model, "none"))
    flags = [f"--config.sample.height={side}", f"--config.sample.width={side}", "--mode=eval"]
    assert command_line.run(monkeypatch, *TINY, *flags, f"--workdir={tmp_path}") == 0, capfd.readouterr().err
    assert sizes == [((8, 8), (8, 8, 3))]
    report = json.loads((tmp_path / "eval.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    found = report["likelihood"]
    assert found["flow"] == {"mean": None, "standard_error": None} and found["bound"] == {"mean": None}


def test_the_figures_do_not_depend_on_the_batches():
    together, apart = means(report(shades(7))), means(report(shades(7), batch_size=3))
    assert together.keys() == apart.keys() >= {"flow", "bound", "bound_prior"}
    np.testing.assert_allclose(list(together.values()), list(apart.values()), rtol=1e-4)
    assert means(report(shades(7), seed=1))["bound"] != together["bound"]


def test_a_model_that_knows_the_classes_finds_them_likelier():
    good, bad = means(report(shades(10))), means(report(shades(10), params=0.5))
    assert good["flow"] < bad["flow"] and good["bound"] < bad["bound"]


def test_latents_are_measured_in_nats_without_bins():
    latents = PIXELS._replace(limit=None)
    found = report(shades(10), codec=latents, terms=0)
    assert (found["of"], found["unit"]) == ("latents", "nats/dim")
    # of a network that knows the mean alone, the flow's density is N(x0, sigma_0^2), but for alpha_0 and its steps
    schedule = schedules.cosine(20)
    records = [shades(10)[i] for i in range(10)]
    x0 = np.stack([record["image"] / 127.5 - 1 for record in records])
    mean = np.array([0.2 * (record["label"] - 2) for record in records])[:, None, None, None]
    level = schedule(0)
    exact = np.mean((x0 - level.alpha * mean) ** 2 / (2 * level.sigma**2)) + np.log(2 * np.pi * level.sigma**2) / 2
    np.testing.assert_allclose(means(report(shades(10), codec=latents, steps=18))["flow"], exact, atol=0.02)


BAD = {
    "config.eval has no field 'image'; known: batch_size, cases, concepts, images": "--config.eval.image=3",
    "flag --config.eval.images=many: invalid literal for int()": "--config.eval.images=many",
    "eval.images must be at least 1, got 0": "--config.eval.images=0",
    "eval.batch_size must be at least 1, got 0": "--config.eval.batch_size=0",
    "eval.probes must be in [1, 1000], got 0": "--config.eval.probes=0",
    "eval.terms must be at least 0, got -1": "--config.eval.terms=-1",
    "eval.steps must be less than the schedule's 1000 steps, got 1000": "--config.eval.steps=1000",
    "no checkpoint in ": "--config.eval.images=3",
    "no trained first stage in ": "--config=configs/autoencoder.py",
    "eval.measures must be some of likelihood, scenes; got 'fid'": "--config.eval.measures=('fid',)",
    "eval.measures must be some of likelihood, scenes; got none": "--config.eval.measures=()",
    "eval.measures=scenes needs a text-conditional model and data.source=emoji": "--config.eval.measures=('scenes',)",
    "eval.cases must be at least 1, got 0": "--config.eval.cases=0",
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_input_is_one_clear_line(expected, tmp_path, capfd, monkeypatch):
    workdir = tmp_path / "run"
    base = [] if "--config=" in BAD[expected] else TINY
    status = command_line.run(monkeypatch, *base, BAD[expected], "--mode=eval", f"--workdir={workdir}")
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert expected in stderr
    assert not workdir.exists()


@pytest.mark.slow
def test_eval_writes_its_figures_and_which_weights_they_are_of(compiled, trained):
    few = ["--config.eval.images=5", "--config.eval.steps=3", "--config.eval.terms=4", "--config.eval.batch_size=4"]
    status, stderr = finish(start(compiled, "--mode=eval", f"--workdir={trained}", *few))
    assert status == 0, stderr
    found = json.loads((trained / "eval.json").read_text())
    assert str(trained) in found["weights"] and "step 24" in found["weights"]
    found = found["likelihood"]
    assert (found["data"], found["images"], found["unit"]) == ("digits-validation", 5, "bits/dim")
    assert np.isfinite([found["flow"]["mean"], found["bound"]["mean"]]).all()
    last = next(line for line in stderr.splitlines() if line.startswith("flow "))
    assert f"flow {found['flow']['mean']:.4f}" in last and "digits-validation" in last and "5 images" in last
