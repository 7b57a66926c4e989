"""Plans against theory: orders of convergence, the law of stochastic samples, and properties of every plan."""

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from diffusion_jax.core import parameterization, sampling, schedules, solvers
from diffusion_jax.core.denoiser import denoiser
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.schedules import NOISE_ALONE
from tests.core import mixture
from tests.core.mixture import HIGH, PLANE


class Case(NamedTuple):
    """build: the solver. order: of convergence. calls: of the network, in so many steps."""

    build: Callable
    order: int | None = None
    calls: Callable[[int], int] = lambda steps: steps


def two_stages(steps: int) -> int:
    return 2 * steps - 1


def one_more(steps: int) -> int:
    return steps + 1 if steps > 1 else 1


DETERMINISTIC = {
    "ddim": Case(solvers.ddim, 1),
    "euler": Case(solvers.euler, 1),
    "heun": Case(solvers.heun, 2, two_stages),
    "flow_heun": Case(solvers.flow_heun, 2, two_stages),
    "dpm_solver 1": Case(partial(solvers.dpm_solver, order=1), 1),
    "dpm_solver 2": Case(partial(solvers.dpm_solver, order=2), 2),
    "dpm_solver 3": Case(partial(solvers.dpm_solver, order=3), 3),
    "dpmpp_1": Case(solvers.dpmpp_1, 1),
    "dpmpp_2s": Case(solvers.dpmpp_2s, 2),
    "dpmpp_2m": Case(solvers.dpmpp_2m, 2),
    "dpmpp_3m": Case(solvers.dpmpp_3m, 3),
    "deis 2": Case(partial(solvers.deis, order=2), 2),
    "deis 3": Case(partial(solvers.deis, order=3), 3),
    "plms": Case(solvers.plms, 2, one_more),
    "lms 2": Case(partial(solvers.lms, order=2), 2),
    "lms 3": Case(partial(solvers.lms, order=3), 3),
    "lms 4": Case(partial(solvers.lms, order=4), 4),
    # the corrector raises the order by one (Zhao et al. 2023, theorem 3.1)
    "unipc 1": Case(partial(solvers.unipc, order=1), 2),
    "unipc 2 bh1": Case(partial(solvers.unipc, order=2, variant="bh1"), 3),
    "unipc 2 bh2": Case(partial(solvers.unipc, order=2, variant="bh2"), 3),
    "unipc 3 bh1": Case(partial(solvers.unipc, order=3, variant="bh1"), 4),
    "unipc 3 bh2": Case(partial(solvers.unipc, order=3, variant="bh2"), 4),
}
STOCHASTIC = {
    "ddpm small": Case(solvers.ddpm),
    "ddpm large": Case(partial(solvers.ddpm, variance="large")),
    "ddim eta 1": Case(partial(solvers.ddim, eta=1.0)),
    "ddim eta 0.5": Case(partial(solvers.ddim, eta=0.5)),
    "euler_ancestral": Case(solvers.euler_ancestral),
    "dpmpp_sde": Case(solvers.dpmpp_sde, calls=two_stages),
    "dpmpp_2m_sde": Case(solvers.dpmpp_2m_sde),
    "churned heun": Case(solvers.with_churn(solvers.heun, churn=40.0, s_min=0.05, s_max=50.0), calls=two_stages),
    "churned euler": Case(solvers.with_churn(solvers.euler, churn=10.0)),
}
# not a sampler of the mixture: exact only for a network that has been made consistent
CONSISTENCY = {"consistency": Case(solvers.consistency)}
ALL = DETERMINISTIC | STOCHASTIC | CONSISTENCY
SCHEDULES = {
    "linear": schedules.linear(),
    "scaled_linear": schedules.scaled_linear(),
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "edm": schedules.edm(),
    "flow": schedules.flow(shift=3.0),
    "zero terminal SNR": schedules.zero_terminal_snr(schedules.scaled_linear()),
}
ENDS_IN_NOISE = ("flow", "zero terminal SNR")


def draw(plan, batch=4, seed=0, denoise=mixture.denoise, shape=(2,), **options):
    keys = jax.random.split(jax.random.key(seed), batch)
    return sampling.sample(denoise, plan, sampling.initial_noise(keys, shape, plan.start), keys, **options)


@functools.cache
def exact_flow(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise at t_max and where the probability flow carries it by t_min, by an adaptive method of order 8."""
    target, schedule = {"plane": PLANE, "high": HIGH}[name], schedules.edm(0.02, 20.0)
    start = schedule.t_max * np.random.default_rng(1).normal(size=(32, target.means.shape[1]))

    def flow(lam, x):  # dx / dlambda = -sigma eps, where alpha = 1
        level = NoiseLevel(0.0, 1.0, np.exp(-lam))
        return -level.sigma * target.denoise(x.reshape(start.shape), level).eps.ravel()

    span = -np.log([schedule.t_max, schedule.t_min])
    solution = solve_ivp(flow, span, start.ravel(), method="DOP853", rtol=1e-10, atol=1e-12)
    return start, solution.y[:, -1].reshape(start.shape)


@pytest.mark.parametrize("target", ["plane", "high"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_converges_to_the_probability_flow_at_its_order(name, target):
    """Slope of the median error over 64, 128 and 256 steps: from 0.7 below the solver's order to one above."""
    build, order, _ = DETERMINISTIC[name]
    start, exact = exact_flow(target)
    counts, errors = [64, 128, 256], []
    for steps in counts:
        plan = build(schedules.edm(0.02, 20.0), steps, spacing="karras")
        # all rows but the last, which jumps from t_min to clean data
        end = mixture.run(plan, start, {"plane": PLANE, "high": HIGH}[target].denoise, rows=plan.num_rows - 1)
        errors.append(np.median(np.abs(end - exact)))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert order - 0.7 < slope < order + 1, (slope, errors)


@functools.cache
def nearly_exact(schedule: str) -> tuple[np.ndarray, np.ndarray]:
    """Noise and the image that many steps of a solver of order 3 make of it, (64, 2) each."""
    noise = np.random.default_rng(0).normal(size=(64, 2))
    plan = solvers.dpmpp_3m(SCHEDULES[schedule], 400, spacing="logsnr")
    return noise, mixture.run(plan, noise, PLANE.denoise)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine", "zero terminal SNR", "flow"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_few_steps_are_near_the_exact_flow_on_every_schedule(name, schedule):
    """Whatever noise a schedule starts from, no solver magnifies the network's errors there."""
    noise, exact = nearly_exact(schedule)
    plan = DETERMINISTIC[name].build(SCHEDULES[schedule], 10)
    error = np.linalg.norm(mixture.run(plan, noise, PLANE.denoise) - exact, axis=1)
    assert np.median(error) < 0.2 and np.quantile(error, 0.9) < 0.6


@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_solvers_draw_from_the_mixture(name):
    samples = 10_000
    x = draw(STOCHASTIC[name].build(schedules.linear(), 250), samples)
    mean, covariance = PLANE.moments()
    error = 4 * np.sqrt(np.diag(covariance) / samples)
    # what 250 steps leave as bias is added to four standard errors
    assert np.all(np.abs(x.mean(0) - mean) < error + 0.02)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.05)
    nearest = jnp.argmin(jnp.sum((x[:, None] - PLANE.means) ** 2, -1), 1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / samples, PLANE.weights, atol=0.02)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde"])
def test_stochastic_solvers_draw_from_the_mixture_in_64_dimensions(name):
    samples = 4000
    x = draw(STOCHASTIC[name].build(schedules.linear(), 100), samples, denoise=HIGH.denoise, shape=(64,))
    mean, covariance = HIGH.moments()
    errors = np.abs(x.mean(0) - mean) / np.sqrt(np.diag(covariance) / samples)
    assert np.max(errors) < 5
    np.testing.assert_allclose(np.trace(np.cov(x.T)), np.trace(covariance), rtol=0.05)
    posterior = (x[:, None] - HIGH.means) ** 2
    log = np.log(HIGH.weights) - 64 * np.log(HIGH.stds) - np.sum(posterior, -1) / (2 * HIGH.stds**2)
    np.testing.assert_allclose(np.bincount(np.argmax(log, 1), minlength=4) / samples, HIGH.weights, atol=0.035)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(ALL)),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    spacing=st.sampled_from(solvers.SPACINGS),
    steps=st.integers(1, 50),
)
def test_every_plan_is_finite_and_ends_clean(name, schedule, spacing, steps):
    """And calls the network as often as is documented."""
    plan = ALL[name].build(SCHEDULES[schedule], steps, spacing=spacing)
    check(plan)
    # a step from pure noise has one stage
    from_noise = np.sum(plan.level.sigma > NOISE_ALONE * plan.level.alpha)
    assert ALL[name].calls(steps) - from_noise <= plan.num_rows <= ALL[name].calls(steps)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ALL)),
    betas=st.lists(st.floats(1e-5, 0.3), min_size=10, max_size=60),
    strength=st.floats(0.1, 1.0),
    spacing=st.sampled_from(solvers.SPACINGS),
    steps=st.integers(5, 10),
)
def test_every_plan_is_sound_on_any_schedule_and_from_any_strength(name, betas, strength, spacing, steps):
    schedule = schedules.from_betas(betas)
    left = solvers.strength_times(schedule, steps, strength, spacing)
    if len(left):
        check(ALL[name].build(schedule, len(left), spacing=left))


CONTINUOUS = {f"flow {shift}": schedules.flow(shift) for shift in (0.3, 1.0, 3.0)} | {
    "edm": schedules.edm(),
    "flow below": schedules.below(schedules.flow()),
}


@pytest.mark.parametrize("steps", [1, 2, 7, 1000, 1500])
@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("schedule", CONTINUOUS)
def test_continuous_times_stay_in_their_range_and_are_taken_as_they_are(schedule, spacing, steps):
    schedule = CONTINUOUS[schedule]
    t = solvers.times(schedule, steps, spacing)
    assert t.shape == (steps,) and np.all(np.diff(t) < 0)
    assert schedule.t_min <= t[-1] and t[0] <= schedule.t_max
    np.testing.assert_array_equal(solvers.times(schedule, steps, t), t)
    np.testing.assert_array_equal(solvers.strength_times(schedule, steps, 1.0, spacing), t)
    for name in ALL if steps <= 7 else ("dpmpp_3m", "dpmpp_sde"):
        check(ALL[name].build(schedule, steps, spacing=t))


def test_a_plan_holds_the_times_of_the_network():
    plan = solvers.ddim(schedules.flow(shift=3.0), 4)
    np.testing.assert_allclose(plan.level.t, [1000, 750, 500, 250])
    np.testing.assert_allclose(plan.next.t, [750, 500, 250, 1])


def near_a_mode(x: np.ndarray) -> float:
    """The share of samples within 3.5 standard deviations of a Gaussian of the mixture."""
    distances = np.linalg.norm(x[:, None] - PLANE.means, axis=-1)
    return np.mean(np.any(distances < 3.5 * PLANE.stds, axis=1))


def imperfect(x: np.ndarray, level: NoiseLevel) -> Prediction:
    """The mixture's denoiser as a network that predicts eps, with an error of up to a hundredth."""
    eps = PLANE.denoise(x, level).eps * (1 + 0.01 * np.sin(3 * x[:, ::-1] + level.t / 50))
    return Prediction((x - level.sigma * eps) / level.alpha, eps)


@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "edm"])  # too few steps for edm
def test_below_noise_alone_a_network_of_eps_may_err(schedule, spacing):
    noise = np.random.default_rng(0).normal(size=(500, 2))

    def largest_error(schedule):
        return near_a_mode(mixture.run(solvers.dpmpp_2m(schedule, 20, spacing), noise, imperfect))

    assert largest_error(schedules.below(SCHEDULES[schedule])) > 0.95
    if schedule in ("cosine", "sigmoid") and spacing in ("linspace", "trailing", "quadratic"):
        assert largest_error(SCHEDULES[schedule]) < 0.9


def check(plan: solvers.Plan) -> None:
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(plan))
    assert plan.next.sigma[-1] == 0 and plan.next.alpha[-1] == 1 and plan.noise[-1] == 0
    # where x0 is 1 and eps 0 for ever, every state is alpha; where x0 is 0 and eps 1, every state is sigma
    states = np.stack([plan.x0, plan.eps], axis=1)
    for k in range(solvers.HISTORY):  # before the first row there is nothing to look back at
        states[k + 1 :] += plan.past[k + 1 :, k, None] * plan.memory[: -k - 1]
    np.testing.assert_allclose(states[:, 0], plan.next.alpha, rtol=1e-5, atol=1e-7)
    if not np.any(plan.noise):
        np.testing.assert_allclose(states[:, 1], plan.next.sigma, rtol=1e-5, atol=1e-7)


def modest(params, x, t, cond):
    """A network with an arbitrary small output."""
    return jnp.tanh(x)


@functools.cache
def modest_denoiser(prediction: str) -> Callable:
    """One for all plans, so that it compiles once."""
    return denoiser(modest, {}, parameterization.NAMED[prediction])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_samples_are_finite_for_every_prediction(name, prediction):
    """At few steps, on every schedule."""
    denoise = modest_denoiser(prediction)
    for schedule in SCHEDULES:
        if prediction == "eps" and schedule in ENDS_IN_NOISE:
            continue
        useful = schedules.below(SCHEDULES[schedule]) if prediction == "eps" else SCHEDULES[schedule]
        for steps in (1, 3, 10):
            assert jnp.all(jnp.isfinite(draw(ALL[name].build(useful, steps), 2, denoise=denoise)))


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


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_solvers_that_are_one_in_exact_arithmetic_agree(schedule):
    def assert_equal(a, b):
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12), a, b)

    schedule = SCHEDULES[schedule]
    ddim = solvers.ddim(schedule, 20)
    assert_equal(solvers.ddim(schedule, 20, eta=1.0), solvers.ddpm(schedule, 20))
    for first_order in (solvers.dpm_solver, solvers.deis, solvers.lms):
        assert_equal(first_order(schedule, 20, order=1)._replace(memory=ddim.memory), ddim)
    assert_equal(solvers.with_churn(solvers.heun, churn=0.0)(schedule, 20), solvers.heun(schedule, 20))
    assert_equal(solvers.with_resampling(ddim, 1), ddim)


def test_inversion_finds_the_noise_again():
    """Down to an image and up again; the error falls with the number of steps, at first order."""
    schedule, errors = schedules.linear(), []
    noise = np.random.default_rng(0).normal(size=(64, 2))
    for steps in (50, 100, 200):
        image = mixture.run(solvers.ddim(schedule, steps, spacing="logsnr"), noise, PLANE.denoise)
        back = mixture.run(solvers.ddim_inversion(schedule, steps, spacing="logsnr"), image, PLANE.denoise)
        errors.append(np.median(np.abs(back - noise)))
    assert errors[2] < 0.6 * errors[1] < 0.4 * errors[0] < 0.05, errors


def test_resampling_goes_back_up_and_ends_clean():
    plan = solvers.with_resampling(solvers.ddpm(schedules.linear(), 10), 3)
    assert plan.num_rows == 30
    np.testing.assert_allclose(plan.next.t[:3], [plan.level.t[0], plan.level.t[0], plan.level.t[3]])
    assert plan.next.sigma[-1] == 0 and plan.noise[-1] == 0
    x = draw(solvers.with_resampling(solvers.ddpm(schedules.linear(), 100), 3), 4000)
    np.testing.assert_allclose(np.cov(x.T), PLANE.moments()[1], atol=0.08)


def test_strength_keeps_the_last_steps():
    schedule = schedules.linear()
    whole = solvers.times(schedule, 20, "trailing")
    for spacing in ("trailing", whole):
        np.testing.assert_array_equal(solvers.strength_times(schedule, 20, 0.25, spacing), whole[15:])
        np.testing.assert_array_equal(solvers.strength_times(schedule, 20, 1.0, spacing), whole)
    assert len(solvers.strength_times(schedule, 20, 0.0)) == 0


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("strength", [0.03, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("spacing", solvers.SPACINGS)
@pytest.mark.parametrize("schedule", ["linear", "flow", "edm"])
def test_few_steps_start_where_the_strength_says(schedule, spacing, strength, steps):
    schedule = {"linear": schedules.linear, "flow": schedules.flow, "edm": schedules.edm}[schedule]()
    left, start = solvers.strength_times(schedule, steps, strength, spacing), schedule.at(strength)
    assert len(left) == max(round(steps * strength), 1) and np.all(left <= start)
    if spacing != "leading":  # which ends one step short
        assert left[0] == pytest.approx(start, abs=schedule.num_steps and 1, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "flow", "edm", "zero terminal SNR"])
@pytest.mark.parametrize("spacing", ["karras", "logsnr"])
def test_ramps_are_even_in_what_they_say(schedule, spacing):
    level = SCHEDULES[schedule](solvers.times(SCHEDULES[schedule], 30, spacing)[1:])
    ramp = level.logsnr if spacing == "logsnr" else (level.sigma / level.alpha) ** (1 / 7)
    np.testing.assert_allclose(np.diff(ramp), np.diff(ramp).mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda s: solvers.ddim(s, 0), "steps must be in 1..1000"),
        (lambda s: solvers.ddim(s, 1001), "steps must be in 1..1000"),
        (lambda s: solvers.ddim(schedules.edm(), 0), "steps must be at least 1"),
        (lambda s: solvers.ddim(s, 10, spacing="even"), "unknown spacing 'even'"),
        (lambda s: solvers.ddim(s, 3, spacing=[900, 950, 10]), "strictly falling"),
        (lambda s: solvers.ddim(s, 3, spacing=[1500, 950, 10]), "strictly falling"),
        (lambda s: solvers.ddim(s, 4, spacing=[900, 500, 10]), "4 strictly falling"),
        (lambda s: solvers.ddim(s, 10, eta=-1.0), "eta must be at least 0"),
        (lambda s: solvers.ddim(s, 10, eta=3.0), "use at most 1"),
        (lambda s: solvers.ddpm(s, 10, variance="learned"), "unknown variance"),
        (lambda s: solvers.dpm_solver(s, 10, order=4), "dpm_solver has orders 1, 2 and 3"),
        (lambda s: solvers.unipc(s, 10, order=5), "unipc has orders 1, 2, 3"),
        (lambda s: solvers.unipc(s, 10, variant="bh3"), "unknown variant 'bh3'"),
        (lambda s: solvers.deis(s, 10, order=0), "deis has orders"),
        (lambda s: solvers.lms(s, 10, order=5), "lms has orders"),
        (lambda s: solvers.with_churn(solvers.dpmpp_2m, 10.0)(s, 10), "not a multistep one"),
        (lambda s: solvers.with_churn(solvers.heun, -1.0), "churn and s_noise must be at least 0"),
        (lambda s: solvers.with_resampling(solvers.heun(s, 10), 2), "one row a step"),
        (lambda s: solvers.with_resampling(solvers.ddim(s, 10), 0), "repeats must be at least 1"),
        (lambda s: solvers.strength_times(s, 10, 1.5), r"strength must be in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build(schedules.linear())
    assert "\n" not in str(error.value)


def test_the_message_about_explicit_times_is_one_line():
    with pytest.raises(ValueError, match="falling values in ") as error:
        solvers.times(schedules.linear(), 500, np.linspace(0, 999, 500))
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
