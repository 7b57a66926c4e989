import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from diffusion_jax.core import guidance, parameterization, process, sampling, schedules, solvers
from diffusion_jax.core.denoiser import as_pytree, denoiser
from tests.core import mixture


def draw(plan, batch=4, seed=0, denoise=mixture.denoise, **options):
    keys = jax.random.split(jax.random.key(seed), batch)
    x = sampling.initial_noise(keys, (2,), plan.start)
    return sampling.sample(denoise, plan, x, keys, **options)


def test_the_scan_is_the_table():
    """The compiled loop computes the rows of the plan, with the noise of its keys."""
    schedule = schedules.linear()
    keys = jax.random.split(jax.random.key(0), 4)
    for plan in (solvers.ddpm(schedule, 23), solvers.dpmpp_sde(schedule, 12), solvers.unipc(schedule, 23, order=3)):
        x = sampling.initial_noise(keys, (2,), plan.start)
        noise = [
            jax.vmap(lambda key, row=row: jax.random.normal(jax.random.fold_in(key, 1 + row), (2,)))(keys)
            for row in range(plan.num_rows)
        ]
        expected = mixture.run(plan, np.float64(x), mixture.denoise, noise=np.float64(noise))
        np.testing.assert_allclose(sampling.sample(mixture.denoise, plan, x, keys), expected, atol=1e-4)


def test_nothing_recompiles():
    """Solver, steps, strength, eta, order, seed, prompt, negative prompt, guidance: one executable for all."""
    schedule = schedules.linear()

    def plain(x, level, cond):
        return mixture.denoise(x + 0 * cond, level)

    denoise = as_pytree(plain)
    plans = [
        *(
            getattr(solvers, name)(schedule, 7)
            for name in ("ddpm", "ddim", "heun", "dpmpp_2s", "dpmpp_2m", "dpmpp_sde")
        ),
        *(getattr(solvers, name)(schedule, 12) for name in ("unipc", "deis", "plms", "lms", "consistency")),
        *(solvers.ddim(schedule, steps, eta=eta) for steps in (1, 10, 33) for eta in (0.0, 0.7)),
        *(solvers.dpm_solver(schedule, 9, spacing, order) for spacing in solvers.SPACINGS for order in (1, 2, 3)),
        solvers.dpmpp_3m(schedule, 5, solvers.strength_times(schedule, 20, 0.25)),
        solvers.with_churn(solvers.heun, 20.0)(schedules.edm(), 8),
        solvers.with_resampling(solvers.ddpm(schedule, 8), 3),
    ]
    before = sampling.advance._cache_size()
    for i, plan in enumerate(plans):
        guided = guidance.classifier_free(denoise, 1.5 + i, jnp.full(1, float(i)))
        draw(plan, seed=i, cond=jnp.full((4, 1), float(i)), denoise=guided)
    assert sampling.advance._cache_size() - before == 1


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.dpmpp_2m, solvers.dpmpp_sde, solvers.unipc])
def test_solver_mathematics_stay_float32_around_a_bfloat16_network(solver):
    """The state does not lose digits: the result is within the network's own rounding, a few units of 2^-8."""

    def apply(params, x, t, cond):
        x = x.astype(params)
        return (x * jnp.tanh(x)).astype(params)

    plan = solver(schedules.linear(), 30)
    results = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        rounded = functools.partial(lambda dtype, params, x, t, cond: apply(dtype, x, t, cond), dtype)
        results[dtype] = draw(plan, 64, denoise=denoiser(rounded, {}, parameterization.v))
    assert results[jnp.bfloat16].dtype == jnp.float32
    error = jnp.abs(results[jnp.bfloat16] - results[jnp.float32])
    scale = jnp.maximum(jnp.abs(results[jnp.float32]), 1)
    assert jnp.median(error / scale) < 2**-8 and jnp.max(error / scale) < 2**-4


def test_chunks_change_nothing():
    plan = solvers.ddpm(schedules.linear(), 23)
    whole = draw(plan, chunk=None)
    for chunk in (1, 10, 23, 40):
        np.testing.assert_allclose(draw(plan, chunk=chunk), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", [solvers.ddpm, solvers.heun, solvers.unipc, solvers.dpmpp_2m_sde])
def test_an_image_does_not_depend_on_its_batch(solver):
    plan = solver(schedules.linear(), 20)
    keys = jax.random.split(jax.random.key(3), 8)
    x = sampling.initial_noise(keys, (2,), plan.start)
    batch = sampling.sample(mixture.denoise, plan, x, keys)
    alone = sampling.sample(mixture.denoise, plan, x[5:6], keys[5:6])
    np.testing.assert_allclose(batch[5:6], alone, atol=1e-5)


def test_inputs_and_previews_outlive_the_sampling():
    plan, previews = solvers.dpmpp_2m(schedules.linear(), 25), []
    keys = jax.random.split(jax.random.key(0), 4)
    x = sampling.initial_noise(keys, (2,), plan.start)
    first = np.array(x)
    out = sampling.sample(mixture.denoise, plan, x, keys, callback=lambda done, x0: previews.append(x0))
    np.testing.assert_array_equal(x, first)
    assert len({np.asarray(preview).tobytes() for preview in previews}) == 3
    np.testing.assert_allclose(previews[-1], out, atol=1e-5)  # the last step ends on the prediction


def test_callback_sees_progress_and_can_stop():
    progress = []

    def stop_after_20(done, x0):
        progress.append((done, x0.shape))
        return done >= 20

    draw(solvers.ddim(schedules.linear(), 45), callback=stop_after_20)
    assert progress == [(10, (4, 2)), (20, (4, 2))]


def test_inpainting_keeps_what_is_known():
    plan = solvers.ddpm(schedules.linear(), 50)
    keys = jax.random.split(jax.random.key(0), 4)
    x = sampling.initial_noise(keys, (2,), plan.start)
    image = jnp.array([[0.5, 0.4], [-1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    samples = sampling.sample(mixture.denoise, plan, x, keys, known=sampling.keep(image, jnp.array([1.0, 0.0])))
    np.testing.assert_array_equal(samples[:, 1], image[:, 1])
    assert jnp.all(samples[:, 0] != image[:, 0])
    everything = sampling.sample(mixture.denoise, plan, x, keys, known=sampling.keep(image, jnp.ones(2)))
    np.testing.assert_array_equal(everything, sampling.sample(mixture.denoise, plan, x, keys))


def fill_in(correlation, plan):
    """4000 samples of x_0 given x_1 = 1.5, of a Gaussian of unit variance whose denoiser is known."""
    covariance = np.array([[1.0, correlation], [correlation, 1.0]])

    def denoise(x, level, cond):
        gain = level.alpha * covariance @ jnp.linalg.inv(level.alpha**2 * covariance + level.sigma**2 * np.eye(2))
        x0 = x @ gain.T
        return process.Prediction(x0, (x - level.alpha * x0) / level.sigma)

    keys = jax.random.split(jax.random.key(0), 4000)
    x = sampling.initial_noise(keys, (2,), plan.start)
    known = sampling.keep(jnp.full((4000, 2), 1.5), jnp.array([1.0, 0.0]))
    return sampling.sample(denoise, plan, x, keys, known=known)[:, 0]


def test_inpainting_draws_from_the_conditional_law():
    """Given x_1 of a correlated Gaussian, x_0 has the mean and deviation of the conditional, with resampling."""
    samples = fill_in(0.8, solvers.with_resampling(solvers.ddpm(schedules.linear(), 60), 8))
    assert abs(samples.mean() - 0.8 * 1.5) < 0.1 and abs(samples.std() - 0.6) < 0.1


def test_the_known_part_is_noised_afresh_at_every_level():
    """One noise for all levels does not average out: it spreads the new part far beyond the truth, 0.31."""
    assert fill_in(0.95, solvers.ddpm(schedules.linear(), 60)).std() < 0.45


def test_inpainting_recompiles_for_no_image_mask_key_or_solver():
    denoise = guidance.as_pytree(lambda x, level, cond: mixture.denoise(x, level))
    plans = [getattr(solvers, name)(schedules.linear(), 7) for name in ("ddim", "ddpm", "dpmpp_2m")]
    before = sampling.advance._cache_size()
    for i, plan in enumerate([*plans, solvers.with_resampling(plans[0], 3)]):
        draw(plan, seed=i, denoise=denoise, known=sampling.keep(jnp.full((4, 2), float(i)), jnp.array([0.0, i / 3])))
    assert sampling.advance._cache_size() - before == 1


def known_noise(plan, keys):
    """The noise of the known part at the level of each row's network, (R, B, 2), and that of the start."""
    states = []

    def denoise(x, level, cond):
        jax.debug.callback(
            lambda x, alpha, sigma: states.append((x - alpha * 0.7) / sigma), x, level.alpha, level.sigma
        )
        return process.Prediction(jnp.zeros_like(x), jnp.zeros_like(x))

    x = sampling.initial_noise(keys, (2,), plan.start)
    known = sampling.keep(jnp.full((len(keys), 2), 0.7), jnp.zeros(2))
    samples = sampling.sample(denoise, plan, x, keys, known=known, chunk=3)
    np.testing.assert_array_equal(samples, known.x0)
    jax.effects_barrier()
    return np.array(states), x


def test_the_known_part_has_its_own_unit_noise_for_each_image_and_row():
    """Whether the solver draws noise or not, and whatever the batch."""
    keys = jax.random.split(jax.random.key(1), 2000)
    for solver in (solvers.ddim, solvers.ddpm):
        plan = solver(schedules.linear(), 4)
        noise, start = known_noise(plan, keys)
        solver_noise = [
            jax.vmap(lambda key, row=row: jax.random.normal(jax.random.fold_in(key, 1 + row), (2,)))(keys)
            for row in range(plan.num_rows)
        ]
        draws = np.concatenate([noise, [start], solver_noise])
        correlation = np.corrcoef(draws[:, :, 0])
        assert np.all(np.abs(correlation - np.eye(len(draws))) < 0.1)
        np.testing.assert_allclose(noise.std(axis=(1, 2)), 1, atol=0.05)
        np.testing.assert_allclose(known_noise(plan, keys[7:9])[0], noise[:, 7:9], atol=1e-5)


def test_a_network_of_eps_is_refused_on_noise_alone():
    schedule = schedules.zero_terminal_snr(schedules.linear())

    def apply(params, x, t, cond):
        return x

    for convert in (parameterization.v, parameterization.x0):
        draw(solvers.ddim(schedule, 3), denoise=denoiser(apply, {}, convert))
    guided = guidance.classifier_free(denoiser(apply, {}, parameterization.eps), 2.0, None)
    with pytest.raises(ValueError, match="use a network that predicts v or x0"):
        draw(solvers.ddim(schedule, 3), denoise=guided)


@pytest.mark.parametrize("shape", [(3,), (4, 2, 2), (3, 2)])
def test_a_mask_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="a mask must have a shape that broadcasts"):
        sampling.keep(jnp.zeros((4, 2)), jnp.ones(shape))


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1 row"):
        draw(solvers.ddim(schedules.linear(), 3), chunk=0)


def plain(x, level, cond):
    return process.Prediction(x / 2, x)


def with_another_argument(x, level, cond, temperature=1.0):
    return process.Prediction(x / 2 * temperature, x)


def with_keywords(x, level, cond, **others):
    assert not others
    return process.Prediction(x / 2, x)


def with_parameters(params, x, level, cond, temperature=1.0):
    return process.Prediction(params * x * temperature, x)


def wrapped(denoise):
    guided = guidance.classifier_free(denoise, 2.0, jnp.zeros(1))
    return guidance.interval(guided, guidance.autoguidance(denoise, denoise, 2.0), 0.1, 2.0)


@pytest.mark.parametrize("wrap", [lambda denoise: denoise, wrapped])
@pytest.mark.parametrize("denoise", [with_another_argument, with_keywords, Partial(with_parameters, jnp.float32(0.5))])
def test_a_denoiser_without_a_parameter_to_gets_no_target(denoise, wrap):
    plan = solvers.ddim(schedules.linear(), 3)
    found, expected = (draw(plan, denoise=wrap(f), cond=jnp.ones((4, 1))) for f in (denoise, plain))
    np.testing.assert_array_equal(found, expected)


def to_last(x, level, cond, temperature=1.0, to=None):
    return process.Prediction(x * to.alpha * temperature, x)


def to_by_name(params, x, level, cond, *, to):
    return process.Prediction(params * x * to.alpha, x)


@pytest.mark.parametrize("wrap", [lambda denoise: denoise, wrapped])
@pytest.mark.parametrize(
    "denoise",
    [
        to_last,
        Partial(to_by_name, jnp.float32(1.0)),
        functools.partial(to_by_name, 1.0),
        Partial(functools.partial(to_by_name, 1.0)),
    ],
)
def test_a_denoiser_gets_the_target_as_its_parameter_to(denoise, wrap):
    def expected(x, level, cond, to):
        return process.Prediction(x * to.alpha, x)

    plan = solvers.ddim(schedules.linear(), 3)
    found, expected = (draw(plan, denoise=wrap(f), cond=jnp.ones((4, 1))) for f in (denoise, expected))
    np.testing.assert_array_equal(found, expected)
