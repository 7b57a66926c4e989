"""The truth has no loss, times are uniform, and one in ten examples learns without its condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import codec as codecs
from diffusion_jax.conditioning import unconditional
from diffusion_jax.core import process, schedules
from diffusion_jax.core.parameterization import NAMED
from diffusion_jax.model import DiffusionModel, Network
from diffusion_jax.objectives import levels
from diffusion_jax.objectives.denoising import denoising, drop_condition

SCHEDULE = schedules.cosine()
NULL = {"text": jnp.full((3, 4), -1.0), "mask": jnp.array([True, False, False])}


def batch(size):
    """Examples of x0 that the condition gives away."""
    x0 = jax.random.normal(jax.random.key(7), (size, 5))
    return {"latent": x0, "cond": {"x0": x0}}


def model(apply, sample, prediction):
    codec = codecs.identity()._replace(sample=sample)
    return DiffusionModel(Network(apply), {}, SCHEDULE, NAMED[prediction], codec, unconditional(), (1, 5))


def loss_of(apply, prediction, weight=levels.uniform_weight, drop=0.0, size=256):
    loss = denoising(model(apply, lambda stats, record, keys: stats * record, prediction), weight, drop)
    frozen = {"codec": jnp.float32(1.0), "conditioning": None, "null_cond": {"x0": jnp.full(5, 9.0)}, "rest": {}}
    keys = jax.random.split(jax.random.key(0), size)
    return loss(None, frozen, batch(size), keys)


def truth(prediction):
    def apply(params, x, t, cond, key):
        level = SCHEDULE(t)
        eps = (x - process.expand(level.alpha, x) * cond["x0"]) / process.expand(level.sigma, x)
        return NAMED[prediction].target(cond["x0"], eps, level)

    return apply


@pytest.mark.parametrize("prediction", NAMED)
def test_the_truth_has_no_loss(prediction):
    value, metrics = loss_of(truth(prediction), prediction)
    assert value < 1e-6 and metrics["mse"] < 1e-6


@pytest.mark.parametrize("prediction", NAMED)
def test_any_other_answer_has_a_loss(prediction):
    def off(*arguments):
        return truth(prediction)(*arguments) + 0.1

    np.testing.assert_allclose(loss_of(off, prediction)[0], 0.01, rtol=1e-3)


def test_saying_nothing_costs_the_variance_of_the_target():
    """eps, x0 and (alpha^2 + sigma^2 = 1) v all have variance 1 here, flow's eps - x0 has 2."""
    for prediction in NAMED:
        variance = 2 if prediction == "flow" else 1
        value, _ = loss_of(lambda params, x, t, cond, key: jnp.zeros_like(x), prediction, size=4000)
        error = 4 * variance * np.sqrt(2 / (4000 * 5))  # four standard errors of a mean of squares
        assert abs(value - variance) < error, prediction


@pytest.mark.parametrize("prediction", NAMED)
def test_the_weight_multiplies_the_error_of_each_example(prediction):
    def off(params, x, t, cond, key):
        return truth(prediction)(params, x, t, cond, key) + jnp.sqrt(t + 1)[:, None] / 100

    calls = []

    def weight(level, name):
        calls.append((level, name))
        return 1 / (level.t + 1)

    value, metrics = loss_of(off, prediction, weight)
    np.testing.assert_allclose(value, 1e-4, rtol=1e-2)
    assert metrics["mse"] > 1e-3
    assert [name for _, name in calls] == [NAMED[prediction]]


def test_times_are_uniform():
    times = []

    def apply(params, x, t, cond, key):
        times.append(t)
        return x

    loss_of(apply, "eps", size=20_000)
    t = np.asarray(times[0])
    assert t.min() >= 0 and t.max() <= SCHEDULE.num_steps - 1 and np.all(t == np.round(t))
    counts = np.bincount((t * 10 // SCHEDULE.num_steps).astype(int), minlength=10)
    assert np.all(np.abs(counts - 2000) < 4 * np.sqrt(2000 * 0.9))


def test_dropped_examples_see_the_null_condition():
    def apply(params, x, t, cond, key):
        dropped = jnp.all(cond["x0"] == 9, axis=1)
        has_condition = jnp.all(cond["x0"] == batch(500)["cond"]["x0"], axis=1)
        assert jnp.all(dropped ^ has_condition)
        counts.append(int(dropped.sum()))
        return x

    counts = []
    for drop in (0.0, 0.3, 1.0):
        loss_of(apply, "eps", drop=drop, size=500)
    assert counts[0] == 0 and counts[2] == 500
    assert abs(counts[1] - 150) < 4 * np.sqrt(500 * 0.3 * 0.7)


def test_one_in_ten_conditions_is_dropped_whole():
    size = 10_000
    cond = {"text": jnp.arange(size * 12, dtype=jnp.float32).reshape(size, 3, 4), "mask": jnp.ones((size, 3), bool)}
    out = drop_condition(cond, NULL, 0.1, jax.random.split(jax.random.key(1), size))
    assert out["mask"].dtype == bool
    dropped = np.all(np.asarray(out["text"]) == -1, axis=(1, 2))
    assert abs(dropped.sum() - 1000) < 4 * np.sqrt(900)
    np.testing.assert_array_equal(out["mask"], np.where(dropped[:, None], NULL["mask"], True))
    np.testing.assert_array_equal(out["text"][~dropped], cond["text"][~dropped])


def test_what_the_null_condition_lacks_is_never_dropped():
    cond = {"mask": jnp.ones((50, 3), bool), "known": jnp.arange(50.0)}
    out = drop_condition(cond, {"mask": NULL["mask"]}, 1.0, jax.random.split(jax.random.key(1), 50))
    np.testing.assert_array_equal(out["mask"], np.tile(NULL["mask"], (50, 1)))
    np.testing.assert_array_equal(out["known"], cond["known"])


@pytest.mark.parametrize("schedule", [SCHEDULE, schedules.flow(), schedules.edm()])
def test_laplace_levels_are_dense_around_their_mean_and_leave_the_schedule_alone(schedule):
    level = levels.laplace(schedule, jax.random.split(jax.random.key(0), 20_000), mean=1.0, scale=0.5)
    off = np.abs(np.asarray(level.logsnr) - 1)
    assert abs(np.median(level.logsnr) - 1) < 0.03 and abs(off.mean() - 0.5) < 0.02
    np.testing.assert_allclose([np.mean(off > distance) for distance in (0.5, 1.5)], np.exp([-1, -3]), atol=0.01)
    known = schedule(schedule.t_of_logsnr(level.logsnr))
    np.testing.assert_allclose(known.logsnr, level.logsnr, atol=1e-2)
    assert schedule(schedule.t_min).logsnr > 8 and schedule(schedule.t_max).logsnr < -8


def test_an_example_does_not_depend_on_its_batch():
    def sample(stats, record, keys):
        return record + jax.vmap(lambda key: jax.random.normal(key, (5,)))(keys)

    loss = denoising(model(lambda params, x, t, cond, keys: jnp.sin(x), sample, "v"), levels.min_snr_weight, 0.1)
    frozen = {"codec": {}, "conditioning": None, "null_cond": {"x0": jnp.zeros(5)}, "rest": {}}
    keys = jax.random.split(jax.random.key(0), 4)
    whole, _ = loss(None, frozen, batch(4), keys)
    alone = [loss(None, frozen, jax.tree.map(lambda a: a[i : i + 1], batch(4)), keys[i : i + 1])[0] for i in range(4)]  # noqa: B023
    np.testing.assert_allclose(whole, np.mean(alone), rtol=1e-5)
