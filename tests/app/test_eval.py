"""--mode=eval, and the report behind it on a network of one weight."""

import json
import os
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from diffusion_jax import build, codec
from diffusion_jax.app import evaluate, sample
from diffusion_jax.conditioning import class_labels
from diffusion_jax.core import parameterization, schedules
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord, to_float
from diffusion_jax.evaluation.likelihood import evaluate_likelihood
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.training import averages
from tests import command_line, test_main
from tests.serve import tiny
from tests.test_main import TINY, finish, start

trained = test_main.trained  # a fixture
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
    result = evaluate_likelihood(model, source, lambda record, rng: record, section)
    json.dumps(result, allow_nan=False)
    return result


def means(result):
    return {name: value["mean"] for name, value in result.items() if isinstance(value, dict)}


def test_the_report_counts_what_it_measured():
    result = report(shades(10, bad=(2, 5)))
    assert (result["images"], result["data"], result["of"], result["unit"]) == (8, "shades", "pixels", "bits/dim")
    assert (result["steps"], result["terms"], result["seed"]) == (8, 6, 0)
    assert report(shades(10), images=6)["images"] == 6
    assert result["flow"]["standard_error"] > 0
    terms = means(result)
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
    monkeypatch.setattr("diffusion_jax.build.weights.load", lambda config, workdir, model: (model, "none"))
    flags = [f"--config.sample.height={side}", f"--config.sample.width={side}", "--mode=eval"]
    assert command_line.run(monkeypatch, *TINY, *flags, f"--workdir={tmp_path}") == 0, capfd.readouterr().err
    assert sizes == [((8, 8), (8, 8, 3))]
    report = json.loads((tmp_path / "eval" / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    likelihood = report["likelihood"]
    assert likelihood["flow"] == {"mean": None, "standard_error": None} and likelihood["bound"] == {"mean": None}


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
    result = report(shades(10), codec=latents, terms=0)
    assert (result["of"], result["unit"]) == ("latents", "nats/dim")
    # of a network that knows the mean alone, the flow's density is N(x0, sigma_0^2), but for alpha_0 and its steps
    schedule = schedules.cosine(20)
    records = [shades(10)[i] for i in range(10)]
    x0 = np.stack([record["image"] / 127.5 - 1 for record in records])
    mean = np.array([0.2 * (record["label"] - 2) for record in records])[:, None, None, None]
    level = schedule(0)
    exact = np.mean((x0 - level.alpha * mean) ** 2 / (2 * level.sigma**2)) + np.log(2 * np.pi * level.sigma**2) / 2
    np.testing.assert_allclose(means(report(shades(10), codec=latents, steps=18))["flow"], exact, atol=0.02)


ALONE = "--config.eval.measures=('distances',)"
BAD = {
    "eval.along measures one average along the run: give its length": "--config.eval.along",
    "distances need at least 20 held-out pictures, got 5": f"{ALONE} --config.eval.images=5",
    "unknown feature network 'fid'; known: alexnet, vgg16, pixels": f"{ALONE} --config.eval.networks=('fid',)",
    "eval.statistics needs one file for each of eval.networks, got 1": f"{ALONE} --config.eval.statistics=('a.npz',)",
    "none/eval has no report.json of an evaluation": "--config.eval.beside=('none',)",
    "config.eval has no field 'image'; known: along, averages, batch_size, beside": "--config.eval.image=3",
    "flag --config.eval.images=many: expected a whole number, got 'many'": "--config.eval.images=many",
    "eval.images must be at least 1, got 0": "--config.eval.images=0",
    "eval.batch_size must be at least 1, got 0": "--config.eval.batch_size=0",
    "eval.probes must be in [1, 1000], got 0": "--config.eval.probes=0",
    "eval.terms must be at least 0, got -1": "--config.eval.terms=-1",
    "eval.steps must be less than the schedule's 1000 steps, got 1000": "--config.eval.steps=1000",
    "no checkpoint in ": "--config.eval.images=3",
    "no trained first stage in ": "--config=configs/autoencoder.py",
    "eval.measures must be some of likelihood, distances, scenes; got 'fid'": "--config.eval.measures=('fid',)",
    "eval.measures must be some of likelihood, distances, scenes; got none": "--config.eval.measures=()",
    "eval.measures=scenes needs a text-conditional model and data.source=emoji": "--config.eval.measures=('scenes',)",
    "eval.cases must be at least 1, got 0": "--config.eval.cases=0",
    "eval.scales=3: this model has guidance 2 built in": "--config=configs/few_step.py:digits/lcm "
    f"--config.eval.scales=1,3 {ALONE} --config.eval.networks=('pixels',)",
    "eval.scales=2: the scale of CFG++ must be in [0, 1]": "--config.eval.scales=0.5,2 --config.sample.cfg_pp=True "
    f"--config.sample.solver=ddim --config.sample.guidance=0.5 {ALONE} --config.eval.networks=('pixels',)",
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_input_is_one_clear_line(expected, tmp_path, capfd, monkeypatch):
    workdir = tmp_path / "run"
    base = [] if "--config=" in BAD[expected] else TINY
    flags = BAD[expected].split()
    status = command_line.run(monkeypatch, *base, *flags, "--mode=eval", f"--workdir={workdir}")
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    assert expected in stderr
    assert not workdir.exists()


def test_pictures_that_are_held_back_are_measured_as_drawn_and_shown_black(monkeypatch):
    drawn = np.random.default_rng(0).integers(1, 256, (2, 8, 8, 3), dtype=np.uint8)
    monkeypatch.setattr(sample, "_images", lambda *_: jnp.asarray(to_float(drawn)))
    model = build.model.diffusion_model(tiny.config())
    model = model._replace(params={}, held_back=lambda images: np.arange(len(images)) == 1)
    measured = list(sample.generate_pictures(tiny.config(), model, ("3", "7"), (0, 1), 1.0))
    np.testing.assert_array_equal(measured, drawn)
    np.testing.assert_array_equal(sample.with_held_back(model, measured), [drawn[0], np.zeros_like(drawn[1])])


@pytest.mark.slow
def test_eval_writes_its_figures_and_which_weights_they_are_of(trained):
    few = ["--config.eval.images=5", "--config.eval.steps=3", "--config.eval.terms=4", "--config.eval.batch_size=4"]
    status, stderr = finish(start("--mode=eval", f"--workdir={trained}", *few))
    assert status == 0, stderr
    result = json.loads((trained / "eval" / "report.json").read_text())
    assert str(trained) in result["weights"] and "step 24" in result["weights"]
    result = result["likelihood"]
    assert (result["data"], result["images"], result["unit"]) == ("digits-validation", 5, "bits/dim")
    assert np.isfinite([result["flow"]["mean"], result["bound"]["mean"]]).all()
    last = next(line for line in stderr.splitlines() if line.startswith("flow "))
    assert f"flow {result['flow']['mean']:.4f}" in last and "digits-validation" in last and "5 images" in last
    assert "negative log-likelihood" in last and "lower is better" in last


FEW = ["--config.eval.images=22", "--config.eval.steps=2", "--config.eval.terms=2", "--config.eval.batch_size=8"]
MEASURES = "--config.eval.measures=('likelihood', 'distances')"
DISTANCES = ["--config.eval.networks=('pixels',)", "--config.eval.reference=30", "--config.sample.batch_size=8"]


def figures(value, path=()):
    """Every number of a report by its path."""
    if isinstance(value, dict):
        return {name: figure for key, part in value.items() for name, figure in figures(part, (*path, key)).items()}
    return {path: value} if isinstance(value, float) else {}


def of_open_mpi(rank, hosts):
    """The variables by which Open MPI tells a process its place; JAX makes the port of the job's number."""
    return {
        "OMPI_MCA_orte_hnp_uri": f"{os.getpid() * 4096}.0;tcp://127.0.0.1:1",
        "OMPI_COMM_WORLD_SIZE": str(hosts),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    }


@pytest.mark.slow
def test_devices_and_hosts_share_the_work_and_report_the_same(trained, tmp_path):
    def begin(name, **options):
        workdir = tmp_path / name
        shutil.copytree(trained, workdir, ignore=shutil.ignore_patterns("eval"))
        return start(
            "--mode=eval",
            MEASURES,
            *FEW,
            *DISTANCES,
            f"--workdir={workdir}",
            *options.pop("flags", ()),
            **options,
        )

    status, stderr = finish(begin("one"))
    assert status == 0, stderr
    status, stderr = finish(begin("eight", devices=8))
    assert status == 0, stderr
    hosts = [begin(f"host{i}", devices=2, flags=["--distributed"], **of_open_mpi(rank=i, hosts=2)) for i in range(2)]
    for status, stderr in map(finish, hosts):
        assert status == 0, stderr
    one, eight, two = (
        figures(json.loads((tmp_path / name / "eval" / "report.json").read_text()))
        for name in ("one", "eight", "host0")
    )
    assert not (tmp_path / "host1" / "eval").exists()
    assert one.keys() == eight.keys() == two.keys() and len(one) > 30
    for other in (eight, two):
        np.testing.assert_allclose(list(other.values()), list(one.values()), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_distances_of_a_run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    flags = ["--mode=eval", "--config.eval.measures=('distances',)", *FEW, *DISTANCES, f"--workdir={tmp_path / 'run'}"]
    said = command_line.succeed(*TINY, *flags, "--config.eval.scales=1,2,3")
    assert "22 pictures in the 192 features of pixels" in said and "full rank" in said and "reference:" in said
    report = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())["distances"]
    assert (report["pictures"], report["reference_pictures"], report["held_out"]) == (22, 30, "digits-validation")
    distances = report["guidance 2"]["pixels"]
    frechet = {name: estimate["value"] for name, estimate in distances["frechet"].items()}
    assert frechet["ratio"] == pytest.approx(frechet["generated"] / frechet["held_out"]) and frechet["ratio"] > 1.2
    assert distances["coverage"]["held_out"]["mean"] > 2 * distances["coverage"]["generated"]["mean"]
    assert (tmp_path / "run" / "eval" / "guidance_1" / "nearest_real.png").exists()
    page = (tmp_path / "run" / "eval" / "report.html").read_text()
    assert page.count("<svg") >= 6 and page.count("data:image/png") == 6 and '"http' not in page

    # from the statistics that this run cached, beside its own report; the second time nothing is computed anew
    cached = str(next((tmp_path / "run" / "cache").glob("statistics-*.npz")))
    again = ["--config.eval.statistics", f"('{cached}',)", f"--config.eval.beside=('{tmp_path / 'run'}',)"]
    assert "reference:" not in command_line.succeed(*TINY, *flags, "--config.eval.scales=2", *again)
    later = json.loads((tmp_path / "run" / "eval" / "report.json").read_text())["distances"]["guidance 2"]["pixels"]
    assert later == distances
    assert (tmp_path / "run" / "eval" / "report.html").read_text().count("<section>") == 2


def test_along_a_run_the_steps_that_cannot_give_a_length_are_left_out_and_named(tmp_path, caplog):
    folder, steps = tmp_path / "averages", range(10, 210, 10)
    folder.mkdir()
    for step in steps:
        (folder / f"{step}.safetensors").touch()
    section = ConfigDict({"averages": (0.2,), "along": True})
    points = evaluate._points(section, tmp_path)
    left_out = [step for step in steps if f"step {step}" not in points]
    assert left_out and 0 < len(left_out) < len(steps)
    for step in steps:
        if step in left_out:
            with pytest.raises(ValueError, match=r"cannot give one of length 0\.2"):
                averages.factors(folder, step, 0.2)
        else:
            assert points[f"step {step}"] == (step, 0.2)
            averages.factors(folder, step, 0.2)
    names = ", ".join(map(str, left_out))
    assert f"eval.along leaves out {len(left_out)} of {len(steps)} steps ({names}): the averages in" in caplog.text
    for file in folder.glob("*0.safetensors"):
        if file.name != "10.safetensors":
            file.unlink()
    with pytest.raises(ValueError, match=r"saved at 1 steps up to 10, cannot give one of length 0\.2: the nearest is"):
        evaluate._points(section, tmp_path)
    with pytest.raises(ValueError, match=r"in \(0, 0\.28\]"):
        evaluate._points(ConfigDict({"averages": (0.5,), "along": True}), tmp_path)


@pytest.mark.slow
def test_averages_of_a_run_are_measured(tmp_path):
    command_line.succeed(*TINY, "--mode=train", "--config.train.post_hoc", f"--workdir={tmp_path}")
    few = ["--mode=eval", *FEW, f"--workdir={tmp_path}"]
    command_line.succeed(*TINY, *few, "--config.eval.averages=0.05,0.15")
    lengths = json.loads((tmp_path / "eval" / "report.json").read_text())["likelihood"]
    assert list(lengths) == ["average 0.05", "average 0.15"]
    command_line.succeed(*TINY, *few, "--config.eval.averages=0.05", "--config.eval.along")
    steps = json.loads((tmp_path / "eval" / "report.json").read_text())["likelihood"]
    assert list(steps) == ["step 6", "step 12", "step 18", "step 24"]
    assert steps["step 24"] == lengths["average 0.05"] != lengths["average 0.15"]
    assert steps["step 24"]["bound"]["mean"] < steps["step 6"]["bound"]["mean"]
    assert (tmp_path / "eval" / "report.html").read_text().count("<svg") == 1
