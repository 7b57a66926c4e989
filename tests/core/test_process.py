import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import parameterization, process, schedules
from diffusion_jax.objectives import levels


@pytest.fixture
def noised():
    keys = jax.random.split(jax.random.key(0))
    x0, eps = (jax.random.normal(key, (6, 4, 4, 3)) for key in keys)
    level = schedules.linear()(jnp.array([0, 10, 200, 500, 900, 999]))
    return x0, eps, level, process.add_noise(x0, eps, level)


@pytest.mark.parametrize("name", ["eps", "x0", "v"])
def test_each_prediction_gives_back_what_was_noised(name, noised):
    x0, eps, level, x_t = noised
    out = {"eps": eps, "x0": x0, "v": process.velocity(x0, eps, level)}[name]
    prediction = parameterization.NAMED[name].predict(x_t, out, level)
    # dividing by the small one of alpha and sigma magnifies float32 rounding
    np.testing.assert_allclose(prediction.x0, x0, atol=1e-4)
    np.testing.assert_allclose(prediction.eps, eps, atol=1e-4)


def test_closed_form_equals_the_markov_chain_in_law():
    betas = np.linspace(0.01, 0.2, 20)
    x0, samples = 1.7, 200_000
    key = jax.random.key(0)
    x = jnp.full(samples, x0)
    for beta in betas:  # Ho et al. 2020, eq. 2
        key, now = jax.random.split(key)
        x = jnp.sqrt(1 - beta) * x + jnp.sqrt(beta) * jax.random.normal(now, x.shape)
    level = schedules.from_betas(betas)(np.array(19))
    assert abs(x.mean() - level.alpha * x0) < 4 * level.sigma / samples**0.5
    assert abs(x.std() - level.sigma) < 4 * level.sigma / (2 * samples) ** 0.5


def test_noising_maps_over_a_batch_and_compiles(noised):
    x0, eps, level, x_t = noised
    mapped = jax.jit(jax.vmap(process.add_noise))(x0, eps, level)
    np.testing.assert_allclose(mapped, x_t, rtol=1e-6)


@pytest.mark.parametrize("weight", [levels.uniform_weight, levels.min_snr_weight, levels.truncated_snr_weight])
def test_weights_of_all_predictions_are_one_weight_on_x0(weight):
    """Except for the uniform weight, which is uniform in each prediction's own space."""
    level = schedules.cosine()(jnp.arange(0, 1000, 37))
    snr = process.snr(level)
    on_x0 = {
        "eps": weight(level, parameterization.eps) * snr,
        "x0": weight(level, parameterization.x0),
        "v": weight(level, parameterization.v) * (snr + 1),
    }
    expected = {
        levels.min_snr_weight: jnp.minimum(snr, 5),
        levels.truncated_snr_weight: jnp.maximum(snr, 1),
    }
    for name, value in on_x0.items():
        if weight is levels.uniform_weight:
            np.testing.assert_array_equal(weight(level, parameterization.NAMED[name]), 1)
        else:
            np.testing.assert_allclose(value, expected[weight], rtol=1e-3)


def test_the_relative_weight_divides_by_the_variance_of_the_target():
    """For data of variance 1. That of v is sigma^2 + alpha^2, of which edm has much and cosine 1."""
    for schedule, t in (
        (schedules.cosine(), jnp.arange(0.0, 1000, 99)),
        (schedules.edm(), jnp.geomspace(0.002, 80, 9)),
    ):
        level = schedule(t)
        variances = {"eps": 1.0, "x0": 1.0, "v": level.alpha**2 + level.sigma**2, "flow": 2.0}
        for name, variance in variances.items():
            weight = levels.relative_weight(level, parameterization.NAMED[name])
            np.testing.assert_allclose(weight * variance, np.ones(len(t)), rtol=1e-5)


def test_the_inverse_noise_weight_is_one_over_sigma_on_x0():
    """With edm's outputs, x0 = c_skip x + c_out F, c_out = s sigma / n (Karras et al. 2022, table 1)."""
    sigma = np.geomspace(0.01, 50, 9)
    weight = levels.inverse_noise_weight(schedules.edm()(jnp.asarray(sigma)), parameterization.edm(0.5))
    np.testing.assert_allclose(weight, (0.5 * sigma) ** 2 / (sigma**2 + 0.25) / sigma, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_min_snr_is_finite_at_zero_terminal_snr(prediction):
    level = process.NoiseLevel(t=jnp.array([999.0]), alpha=jnp.array([0.0]), sigma=jnp.array([1.0]))
    assert jnp.all(jnp.isfinite(levels.min_snr_weight(level, parameterization.NAMED[prediction])))
