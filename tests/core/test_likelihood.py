"""Laws of the two likelihoods, on data whose density is known in closed form at every noise level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr

from diffusion_jax.core import likelihood, schedules
from diffusion_jax.core.likelihood import gaussian_decoder, log_likelihood, pixel_decoder, variational_bound
from diffusion_jax.core.process import NoiseLevel, Prediction
from tests.core.mixture import HIGH, PLANE, Mixture

CLEAN = NoiseLevel(0.0, 1.0, 0.0)
# the last two end in pure noise, so their prior is exact
SCHEDULES = {
    "linear": schedules.linear(),
    "cosine": schedules.cosine(),
    "edm": schedules.edm(),
    "flow": schedules.flow(),
    "zero terminal SNR": schedules.zero_terminal_snr(schedules.scaled_linear()),
}
NORMAL = Mixture(means=np.zeros((1, 6)), stds=np.array([0.7]), weights=np.ones(1))


def log_density(mixture, x, level):
    """log p(x) of alpha x0 + sigma eps, float64, (B,)."""
    variance = level.alpha**2 * mixture.stds**2 + level.sigma**2
    squares = np.sum((np.asarray(x, np.float64)[:, None] - level.alpha * mixture.means) ** 2, -1)
    dim = mixture.means.shape[1]
    return np.log(np.exp(-squares / (2 * variance)) @ (mixture.weights / (2 * np.pi * variance) ** (dim / 2)))


def draw(mixture, level, count, seed=0):
    """(count, D) of alpha x0 + sigma eps."""
    rng = np.random.default_rng(seed)
    k = rng.choice(len(mixture.weights), count, p=mixture.weights)
    x0 = mixture.means[k] + mixture.stds[k][:, None] * rng.normal(size=(count, mixture.means.shape[1]))
    return jnp.asarray(level.alpha * x0 + level.sigma * rng.normal(size=x0.shape), jnp.float32)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def each_its_level(mixture):
    """The mixture's denoiser, taking a level for each x."""

    def denoise(x, level, cond=None):
        of_image = jax.vmap(lambda x, *level: mixture.denoise(x[None], NoiseLevel(*level)))
        return jax.tree.map(lambda out: out[:, 0], of_image(x, *level))

    return denoise


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("mixture, tolerance", [(NORMAL, 3e-3), (PLANE, 1e-2), (HIGH, 3e-2)], ids=["6", "2", "64"])
def test_the_flow_finds_the_density_of_the_noised_data(name, mixture, tolerance):
    schedule = SCHEDULES[name]
    level = schedule(schedule.t_min)
    x = draw(mixture, level, 16)
    density = log_likelihood(mixture.denoise, schedule, x, keys(16), steps=80, probes=None)
    np.testing.assert_allclose(density, log_density(mixture, x, level), atol=tolerance)


@pytest.mark.parametrize("name", ["flow", "zero terminal SNR"])
def test_the_flow_converges_at_order_four(name):
    schedule, steps = SCHEDULES[name], np.array([24, 48, 96])
    level = schedule(schedule.t_min)
    x = draw(PLANE, level, 64)
    exact = log_density(PLANE, x, level)
    errors = [
        np.mean(np.abs(log_likelihood(PLANE.denoise, schedule, x, keys(64), steps=int(n), probes=None) - exact))
        for n in steps
    ]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert 3.5 < slope < 6, errors


def test_the_prior_is_a_normal_of_the_variance_of_x():
    """Where the data is a unit normal, x_t is the prior at every level, and the flow leaves its density as it is."""
    unit = Mixture(means=np.zeros((1, 3)), stds=np.ones(1), weights=np.ones(1))
    for schedule in (schedules.linear(50), schedules.edm(0.5, 2.0), schedules.flow()):
        level = schedule(schedule.t_min)
        x = draw(unit, level, 8)
        density = log_likelihood(unit.denoise, schedule, x, keys(8), steps=2)
        np.testing.assert_allclose(density, log_density(unit, x, level), atol=2e-4)


def test_hutchinson_is_unbiased_and_more_probes_spread_less():
    x = jnp.tile(draw(PLANE, CLEAN, 1), (1024, 1))
    exact = log_likelihood(PLANE.denoise, SCHEDULES["cosine"], x[:1], keys(1), steps=10, probes=None)
    densities = {
        probes: np.asarray(log_likelihood(PLANE.denoise, SCHEDULES["cosine"], x, keys(1024), steps=10, probes=probes))
        for probes in (1, 4)
    }
    for values in densities.values():
        assert values.std() > 0
        assert abs(values.mean() - exact[0]) < 4 * values.std() / 32
    assert 1.7 < densities[1].std() / densities[4].std() < 2.3  # the root of 4


def test_the_trace_along_the_axes_is_that_of_the_jacobian():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
    probes = likelihood._probes(keys(3), (2, 2), None)
    product = jnp.einsum("ij,pbj->pbi", matrix, probes.reshape(4, 3, 4))
    estimate = jnp.mean(jnp.sum(probes.reshape(4, 3, 4) * product, -1), 0)
    np.testing.assert_allclose(estimate, jnp.full(3, jnp.trace(matrix)), rtol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
    def figures(x0, keys):
        flow = log_likelihood(PLANE.denoise, SCHEDULES["cosine"], x0, keys, steps=5, probes=2)
        bound = variational_bound(each_its_level(PLANE), SCHEDULES["cosine"], x0, keys, terms=5)
        return np.stack([flow, *bound])

    x0 = draw(PLANE, CLEAN, 6)
    together = figures(x0, keys(6))
    np.testing.assert_allclose(figures(x0[3:5], keys(6)[3:5]), together[:, 3:5], rtol=1e-4)
    changed = np.abs(figures(x0, keys(6, seed=1)) - together).max(1) > 0
    np.testing.assert_array_equal(changed, [True, False, True, True])  # the prior needs no key


def test_the_condition_reaches_the_denoiser():
    def denoise(x, level, cond):
        shifted = Prediction(*PLANE.denoise(x - level.alpha * cond, level))
        return Prediction(shifted.x0 + cond, shifted.eps)

    x, cond = draw(PLANE, CLEAN, 4), jnp.arange(4.0)[:, None] * jnp.ones((1, 2))
    schedule = SCHEDULES["zero terminal SNR"]
    shifted = x + schedule(schedule.t_min).alpha * cond
    density = log_likelihood(denoise, schedule, shifted, keys(4), cond, steps=80)
    np.testing.assert_allclose(density, log_likelihood(PLANE.denoise, schedule, x, keys(4), steps=80), atol=2e-2)


@pytest.mark.parametrize("mixture", [PLANE, HIGH], ids=["2", "64"])
def test_the_bound_is_above_the_negative_log_likelihood_and_tends_to_it(mixture):
    schedule = schedules.edm(0.01, 100.0)
    x0 = draw(mixture, CLEAN, 1024)
    exact = -log_density(mixture, x0, CLEAN)
    gaps = []
    for T in (16, 64, 256):
        bound = variational_bound(each_its_level(mixture), schedule, x0, keys(1024), steps=T, decoder=gaussian_decoder)
        gap = np.asarray(bound.total) - exact
        assert gap.mean() > 3 * gap.std() / 32
        gaps.append(gap.mean())
    # what is left is of order 1 / T
    assert 0.15 < gaps[1] / gaps[0] < 0.3 and 0.15 < gaps[2] / gaps[1] < 0.3, gaps


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [schedules.linear(100), SCHEDULES["zero terminal SNR"], schedules.flow()])
def test_some_terms_estimate_all_of_them(schedule):
    x0, denoise = draw(HIGH, CLEAN, 512), each_its_level(HIGH)
    full = variational_bound(denoise, schedule, x0, keys(512), decoder=gaussian_decoder)
    some = variational_bound(denoise, schedule, x0, keys(512, seed=1), terms=8, decoder=gaussian_decoder)
    np.testing.assert_array_equal(some.prior, full.prior)
    difference = np.asarray(some.diffusion - full.diffusion)
    assert abs(difference.mean()) < 4 * difference.std() / 512**0.5
    assert difference.std() < 0.5 * np.mean(full.diffusion)
    all_terms = variational_bound(denoise, schedule, x0, keys(512), terms=10_000, decoder=gaussian_decoder)
    np.testing.assert_array_equal(all_terms.diffusion, full.diffusion)


def test_the_bound_of_a_normal_is_that_of_the_paper():
    """L_T is the KL of Ho et al. 2020, eq. 5, and L_t that of eq. 8 between two normals, in betas."""
    T = 20
    schedule = schedules.from_betas(np.linspace(1e-3, 0.3, T))
    bar, beta = schedule.alphas_bar, np.linspace(1e-3, 0.3, T)
    x0 = draw(NORMAL, CLEAN, 5)

    def nothing_known(x, level, cond=None):
        return Prediction(jnp.zeros_like(x), x / level.sigma[:, None])

    bound = variational_bound(nothing_known, schedule, x0, keys(5), decoder=gaussian_decoder)
    size, square = x0.shape[1], np.sum(np.asarray(x0, np.float64) ** 2, 1)
    np.testing.assert_allclose(bound.prior, (bar[-1] * (square - size) - size * np.log(1 - bar[-1])) / 2, rtol=1e-4)
    variance = beta[1:] * (1 - bar[:-1]) / (1 - bar[1:])  # of q(x_{t-1} | x_t, x0), eq. 7
    on_x0 = np.sqrt(bar[:-1]) * beta[1:] / (1 - bar[1:])
    np.testing.assert_allclose(bound.diffusion, square * np.sum(on_x0**2 / (2 * variance)), rtol=1e-4)
    first = square / (2 * beta[0]) + size / 2 * np.log(2 * np.pi * beta[0])
    np.testing.assert_allclose(bound.decoder, first, rtol=1e-4)


@pytest.mark.parametrize("mean, std", [(0.3, 0.5), (-1.0, 0.01), (3.0, 0.01), (0.1, 1e-3), (-20.0, 1.0)])
def test_the_decoder_of_pixels_gives_each_value_a_part_of_one(mean, std):
    x0 = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
    log_mass = np.asarray(pixel_decoder(x0, jnp.float32(mean), jnp.float32(std)), np.float64)
    borders = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
    np.testing.assert_allclose(np.exp(log_mass), np.diff(ndtr((borders - mean) / std)), atol=2e-5)
    assert np.all(np.isfinite(log_mass))  # far from the mean too, where the mass itself is 0 in float32


def test_bits_per_dim_of_even_noise_is_eight():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)) / 127.5 - 1
    x = likelihood.dequantize(jnp.asarray(images, jnp.float32), keys(4))
    np.testing.assert_array_equal(np.round((x + 1) * 127.5), np.round((images + 1) * 127.5))
    density = 1 / (256 * likelihood.PIXEL)  # even over all that 8-bit values spread to
    nats = -np.log(density) * jnp.full(4, float(images[0].size))
    np.testing.assert_allclose(likelihood.bits_per_dim(nats, images[0].size), 8, rtol=1e-6)
    probability = np.log(256) * jnp.full(4, float(images[0].size))
    np.testing.assert_allclose(likelihood.bits_per_dim(probability, images[0].size, bin=1.0), 8, rtol=1e-6)


def test_the_number_of_steps_compiles_one_denoiser():
    traced = []

    def denoise(x, level, cond=None):
        traced.append(x.shape)
        return PLANE.denoise(x, level)

    x = draw(PLANE, CLEAN, 2)
    log_likelihood(denoise, SCHEDULES["cosine"], x, keys(2), steps=3)
    once = len(traced)
    log_likelihood(denoise, SCHEDULES["cosine"], x + 1, keys(2), steps=3)
    assert len(traced) == once <= 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x, k: log_likelihood(PLANE.denoise, schedules.linear(10), x, k, steps=10), "in 1..9, got 10"),
        (lambda x, k: log_likelihood(PLANE.denoise, schedules.edm(), x, k, steps=0), "at least 1, got 0"),
        (lambda x, k: log_likelihood(PLANE.denoise, schedules.edm(), x, k, probes=0), "at least 1 probe, got 0"),
        (lambda x, k: variational_bound(PLANE.denoise, schedules.edm(), x, k, terms=0), "at least 1 term, got 0"),
        (lambda x, k: variational_bound(PLANE.denoise, schedules.linear(10), x, k, steps=11), "in 1..10"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message.replace("(", "[(]")):
        call(draw(PLANE, CLEAN, 2), keys(2))
