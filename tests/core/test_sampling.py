import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.core import guidance, process, sampling, schedules, solvers
from tests.core import mixture

SOLVERS = {
    "ddim": solvers.ddim,
    "ddim eta 1": functools.partial(solvers.ddim, eta=1.0),
    "ddpm small": solvers.ddpm,
    "ddpm large": functools.partial(solvers.ddpm, variance="large"),
    "dpmpp_2m": solvers.dpmpp_2m,
}
DETERMINISTIC = {"ddim": 1, "dpmpp_2m": 2}  # and their order


def draw(plan, batch=4, seed=0, denoise=mixture.denoise, **options):
    keys = jax.random.split(jax.random.key(seed), batch)
    x = sampling.initial_noise(keys, (2,), plan.start)
    return sampling.sample(denoise, plan, x, keys, **options)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_converges_to_the_probability_flow_at_its_order(name):
    schedule = schedules.linear()
    # the sampler ends at the least noisy time, where all of them make the same last step
    exact = draw(solvers.dpmpp_2m(schedule, 1000, spacing="logsnr"), 64)
    counts = [20, 40, 80, 160]
    errors = [
        float(jnp.sqrt(jnp.mean((draw(SOLVERS[name](schedule, n, spacing="logsnr"), 64) - exact) ** 2))) for n in counts
    ]
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - DETERMINISTIC[name]) < 0.35, (slope, errors)


@pytest.mark.parametrize("name", SOLVERS)
def test_reproduces_the_mixture(name):
    samples = 20_000
    x = draw(SOLVERS[name](schedules.linear(), 250), samples)
    mean, covariance = mixture.moments()
    error = 4 * np.sqrt(np.diag(covariance) / samples)
    # what 250 steps leave as bias is added to four standard errors
    assert np.all(np.abs(x.mean(0) - mean) < error + 0.02)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.05)
    nearest = jnp.argmin(jnp.sum((x[:, None] - mixture.MEANS) ** 2, -1), 1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / samples, mixture.WEIGHTS, atol=0.02)


def test_ddpm_row_is_the_posterior_of_the_paper():
    """Ho et al. 2020, eq. 6 and 7, written in betas."""
    betas = np.linspace(1e-4, 0.02, 100)
    schedule = schedules.from_betas(betas)
    bar = schedule.alphas_bar
    plan = solvers.ddpm(schedule, 100)
    t = np.arange(99, 0, -1)
    on_x0 = np.sqrt(bar[t - 1]) * betas[t] / (1 - bar[t])
    on_x = np.sqrt(1 - betas[t]) * (1 - bar[t - 1]) / (1 - bar[t])
    np.testing.assert_allclose(plan.eps[:-1], on_x * np.sqrt(1 - bar[t]), rtol=1e-9)
    np.testing.assert_allclose(plan.x0[:-1], on_x0 + on_x * np.sqrt(bar[t]), rtol=1e-9)
    np.testing.assert_allclose(plan.noise[:-1] ** 2, betas[t] * (1 - bar[t - 1]) / (1 - bar[t]), rtol=1e-9)
    large = solvers.ddpm(schedule, 100, variance="large")
    np.testing.assert_allclose(large.noise[:-1] ** 2, betas[t], rtol=1e-9)


def test_ddim_with_eta_1_is_ddpm():
    schedule = schedules.cosine()
    jax.tree.map(np.testing.assert_array_equal, solvers.ddim(schedule, 50, eta=1.0), solvers.ddpm(schedule, 50))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SOLVERS)),
    schedule=st.sampled_from([schedules.linear, schedules.scaled_linear, schedules.cosine, schedules.sigmoid]),
    spacing=st.sampled_from(solvers.SPACINGS),
    steps=st.integers(1, 50),
)
def test_every_plan_is_finite_and_ends_clean(name, schedule, spacing, steps):
    plan = SOLVERS[name](schedule(), steps, spacing=spacing)
    assert plan.num_rows == steps
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(plan))
    assert np.all(np.diff(plan.level.t) < 0)
    assert plan.next.sigma[-1] == 0 and plan.noise[-1] == 0
    assert jnp.all(jnp.isfinite(draw(plan, batch=2)))


def test_nothing_recompiles():
    schedule = schedules.linear()

    @jax.tree_util.Partial
    def denoise(x, level, cond):
        return mixture.denoise(x + 0 * cond, level)

    cond = jnp.ones((4, 1))
    before = sampling.advance._cache_size()
    for name in SOLVERS:
        for steps in (1, 7, 10, 33):
            for scale in (1.0, 7.5):
                draw(
                    SOLVERS[name](schedule, steps), seed=steps, cond=cond,
                    denoise=guidance.classifier_free(denoise, scale, jnp.zeros(1)),
                )  # fmt: skip
    assert sampling.advance._cache_size() - before == 1


def test_chunks_change_nothing():
    plan = solvers.ddpm(schedules.linear(), 23)
    whole = draw(plan, chunk=None)
    for chunk in (1, 10, 23, 40):
        np.testing.assert_allclose(draw(plan, chunk=chunk), whole, rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch():
    plan = solvers.ddpm(schedules.linear(), 20)
    keys = jax.random.split(jax.random.key(3), 8)
    x = sampling.initial_noise(keys, (2,), plan.start)
    batch = sampling.sample(mixture.denoise, plan, x, keys)
    alone = sampling.sample(mixture.denoise, plan, x[5:6], keys[5:6])
    np.testing.assert_allclose(batch[5:6], alone, atol=1e-5)


def test_callback_sees_progress_and_can_stop():
    seen = []

    def stop_after_20(done, x0):
        seen.append((done, x0.shape))
        return done >= 20

    draw(solvers.ddim(schedules.linear(), 45), callback=stop_after_20)
    assert seen == [(10, (4, 2)), (20, (4, 2))]


def test_guidance_of_scale_1_is_none_and_0_is_unconditional():
    def denoise(x, level, cond):
        return process.Prediction(x0=x * cond, eps=x - cond)

    x, cond = jnp.ones((3, 2)), jnp.array([[1.0], [2.0], [3.0]])
    level = schedules.linear()(jnp.float32(500))
    plain = denoise(x, level, cond)
    for scale, expected in [(1.0, plain), (0.0, denoise(x, level, jnp.zeros((3, 1))))]:
        guided = guidance.classifier_free(denoise, scale, jnp.zeros(1))(x, level, cond)
        np.testing.assert_allclose(guided.x0, expected.x0, rtol=1e-6)
        np.testing.assert_allclose(guided.eps, expected.eps, rtol=1e-6)


def test_guidance_scale_may_differ_by_image_and_calls_the_network_once():
    calls = []

    def denoise(x, level, cond):
        calls.append(x.shape)
        return process.Prediction(x0=x * cond, eps=x)

    scale = jnp.array([1.0, 2.0, 3.0])
    guided = guidance.classifier_free(denoise, scale, jnp.zeros(1))
    out = guided(jnp.ones((3, 2)), schedules.linear()(jnp.float32(5)), jnp.ones((3, 1)))
    np.testing.assert_allclose(out.x0, jnp.broadcast_to(scale[:, None], (3, 2)))
    assert calls == [(6, 2)]


def test_clipping_keeps_the_pair_tied():
    level = schedules.linear()(jnp.float32(300))
    x = 3 * jax.random.normal(jax.random.key(0), (5, 4))
    clipped = guidance.clip_x0(lambda x, level, cond: process.from_eps(x, 0.1 * x, level))(x, level, None)
    assert jnp.max(jnp.abs(clipped.x0)) <= 1
    np.testing.assert_allclose(level.alpha * clipped.x0 + level.sigma * clipped.eps, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda s: solvers.ddim(s, 0), "steps must be in 1..1000"),
        (lambda s: solvers.ddim(s, 1001), "steps must be in 1..1000"),
        (lambda s: solvers.ddim(s, 10, spacing="even"), "unknown spacing 'even'"),
        (lambda s: solvers.ddim(s, 3, spacing=[900, 950, 10]), "strictly falling"),
        (lambda s: solvers.ddim(s, 3, spacing=[1500, 950, 10]), "strictly falling"),
        (lambda s: solvers.ddim(s, 10, eta=-1.0), "eta must be at least 0"),
        (lambda s: solvers.ddpm(s, 10, variance="learned"), "unknown variance"),
    ],
)
def test_bad_arguments_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build(schedules.linear())
    assert "\n" not in str(error.value)
