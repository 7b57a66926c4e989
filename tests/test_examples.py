"""The Python examples of README.md and CONTRIBUTING.md work as they stand there."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax.build.records import check_condition
from diffusion_jax.codec import identity
from diffusion_jax.conditioning import unconditional
from diffusion_jax.core import parameterization, schedules, solvers
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.objectives.denoising import denoising, frozen_parts
from diffusion_jax.objectives.levels import uniform_weight
from diffusion_jax.pipelines import text_to_image
from diffusion_jax.training.loop import Task, fit
from tests.documents import example
from tests.test_published import checkpoint, vocabulary  # noqa: F401  (fixtures)
from tests.training import linear


def test_readme_network_of_ones_own():
    x0 = example("README.md", "a very small one")["x0"]
    assert x0.shape == (8, 32, 32, 4) and np.isfinite(x0).all()


@pytest.mark.slow
def test_readme_demo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = example("README.md", "load_model")["images"]
    assert images.shape == (2, 128, 128, 3) and np.isfinite(images).all()


def test_readme_stable_diffusion(checkpoint):  # noqa: F811
    images = example("README.md", "from_published", FOLDER=str(checkpoint), **{"(512, 768)": "(8, 12)"})["images"]
    assert images.shape == (1, 8, 12, 3) and np.isfinite(images).all()


def test_contributing_solver():
    ddim = example("CONTRIBUTING.md", "def ddim")["ddim"]
    for schedule in (schedules.cosine(), schedules.flow()):
        jax.tree.map(np.testing.assert_array_equal, ddim(schedule, 7), solvers.ddim(schedule, 7))


def trained(loss, params, frozen, records, workdir):
    """What training with this loss makes of params."""
    source = Source("records", len(records), lambda i: records[i])

    def batches(start):
        return loader(source, 8, seed=0, start=start)

    task = Task("example", loss, params, frozen, batches, optax.adam(0.1))
    return fit(task, workdir, linear.section(steps=200, checkpoint_every=200), seed=0)


def test_contributing_objective(tmp_path):
    loss = example("CONTRIBUTING.md", "def regression")["regression"](lambda params, x: params["a"] * x + params["b"])
    records = [{"x": np.float32(x), "y": np.float32(3 * x - 1)} for x in np.linspace(-1, 1, 32)]
    weights = trained(loss, {"a": jnp.zeros(()), "b": jnp.zeros(())}, {}, records, tmp_path)
    np.testing.assert_allclose([weights["a"], weights["b"]], [3, -1], atol=0.05)


def test_contributing_model_and_data_source(tmp_path):
    source = example("CONTRIBUTING.md", "def checkers")["checkers"](16)
    check_condition({"text": np.zeros((1, 1))}, source)
    image = source[0]["image"]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and set(np.unique(image)) == {0, 255}

    names = example("CONTRIBUTING.md", "class Linear")
    params = names["Linear"]().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros(1))
    parts = schedules.flow(), parameterization.v, identity(), unconditional(), (8, 8)
    model = DiffusionModel(Network(names["apply"]), params, *parts)
    records = [{"latent": record["image"], "cond": {}} for record in map(source.read, range(len(source)))]
    loss, frozen = denoising(model, uniform_weight, drop=0.0), frozen_parts(model, {})
    model = model._replace(params=trained(loss, params, frozen, records, tmp_path))
    batch = {"latent": jnp.stack([record["latent"] for record in records]), "cond": {}}
    keys = jax.random.split(jax.random.key(1), len(source))
    before, after = (loss(each, frozen, batch, keys)[0] for each in (params, model.params))
    assert after < 0.7 * before
    images = text_to_image(model, {}, keys[:2], solvers.ddim(model.useful_schedule, 5))
    assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all()
