"""Every solver that diffusers has too, beside it (see tests/core/peer.py): the same network, the same time steps, the
same noise. Where a peer differs, a number says how far, so that leaving it out cannot hide an error of ours.
"""

import functools
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import guidance, parameterization, sampling, schedules, solvers
from diffusion_jax.core.process import NoiseLevel, Prediction

diffusers = pytest.importorskip("diffusers")
peer = pytest.importorskip("tests.core.peer")

CONVERT = {name: parameterization.NAMED[name].predict for name in ("eps", "v", "x0")}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Arrays of 15 numbers are not worth two threads."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", peer.PEERS)
def test_every_state_on_the_way_is_the_peers(name):
    assert_agrees(name, peer.few_cases(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", peer.PEERS)
def test_every_state_is_the_peers_in_every_case(name):
    assert_agrees(name, peer.cases(name))


def assert_agrees(name, cases):
    differences = {case: peer.difference(name, *case) for case in cases}
    wrong = {case: d for case, d in differences.items() if not d < peer.PEERS[name].rounding}
    assert not wrong, wrong


@pytest.mark.parametrize("name", [name for name, p in peer.PEERS.items() if p.noise is None and p.exploding is False])
def test_an_untouched_peer_agrees_to_its_float32_tables(name):
    p = peer.PEERS[name]
    ours, theirs = peer.compare(p, "scaled_linear", p.kinds[-1], 10, p.spacings[-1], exact=False)
    count = len(ours) - p.left_out(10, p.spacings[-1])
    assert peer.relative(ours[:count], theirs[:count]) < 1e-4


@pytest.mark.parametrize(
    "name, schedule, kind, steps, spacing",
    [
        ("ddim", "scaled_linear", "eps", 20, "leading"),
        ("euler", "linear", "v", 7, "trailing"),
        ("heun", "scaled_linear", "x0", 10, "leading"),
        ("dpm_solver 3", "scaled_linear", "v", 10, "trailing"),
        ("dpmpp_2m", "linear", "v", 20, "trailing"),
        ("dpmpp_2s", "cosine", "x0", 7, "trailing"),
        ("unipc 3 bh2", "scaled_linear", "v", 10, "linspace"),
        ("plms", "scaled_linear", "eps", 10, "leading"),
        ("lms", "linear", "x0", 7, "trailing"),
    ],
)
def test_what_is_sampled_on_the_device_is_the_peers(name, schedule, kind, steps, spacing):
    p = peer.PEERS[name]
    plan = p.plan(schedule, p.build(schedule, kind, steps, spacing))
    _, theirs = peer.compare(p, schedule, kind, steps, spacing)

    def denoise(x, level, cond):
        return CONVERT[kind](x, peer.network(x, level, kind), level)

    x = jnp.asarray(peer.START, jnp.float32)
    ours = sampling.sample(denoise, plan, x, jax.random.split(jax.random.key(0), len(x)))
    np.testing.assert_allclose(ours, theirs[-1], atol=1e-4)


@pytest.mark.parametrize("name", peer.DEVIATIONS)
def test_the_peer_deviates_where_it_is_said_to(name):
    deviation = peer.DEVIATIONS[name]
    assert deviation.measure() > deviation.least, deviation.what


def test_the_third_order_needs_the_factor_of_2():
    """In DPM-Solver++(3M) as published the error falls with the square of the step, with ours with its cube."""
    schedule = schedules.linear()
    denoise = functools.partial(peer.predict, kind="x0")

    def at_the_end(build, steps):
        ramp = np.linspace(schedule(999.0).logsnr, schedule(300.0).logsnr, steps + 1)
        levels = [schedule(schedule.t_of_logsnr(logsnr)) for logsnr in ramp]
        # in two more steps the order falls
        levels += [schedule(100.0), NoiseLevel(0.0, 1.0, 0.0)]
        plan = build(schedule, steps + 2, spacing=list(itertools.pairwise(levels)))
        return peer.our_states(plan, peer.START, denoise, np.zeros((steps + 2, *peer.START.shape)))[steps - 1]

    exact, counts = at_the_end(solvers.dpmpp_3m, 1500), [80, 160, 320]

    def order(build):
        errors = [np.sqrt(np.mean((at_the_end(build, n) - exact) ** 2)) for n in counts]
        return -np.polyfit(np.log(counts), np.log(errors), 1)[0]

    assert order(solvers.dpmpp_3m) > 2.7
    assert order(peer.published_3m) < 2.3


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 14])
def test_below_15_steps_the_order_falls_as_the_peers(steps):
    assert peer.difference("dpmpp_3m, half of D_2", "linear", "eps", steps, "trailing") < 1e-9
    assert peer.difference("deis 3", "linear", "eps", steps, "trailing") < 1e-9


@pytest.mark.parametrize("steps", range(1, 10))
def test_singlestep_solvers_take_their_last_step_alone(steps):
    """Whatever is left over of the steps: older peers ended on sigma = 0 with a step of order 2."""
    assert peer.difference("dpmpp_2s", "linear", "eps", steps, "linspace") < 1e-9


def test_clipping_keeps_eps_tied_as_the_peer_can():
    tied = replace(peer.CLIPPED, options={"eta": 0.0, "use_clipped_model_output": True})
    assert peer.relative(*peer.compare(tied, "linear", "eps", 10, "leading")) < 1e-9
    eta = replace(
        peer.CLIPPED,
        ours=functools.partial(solvers.ddim, eta=1.0),
        options={"eta": 1.0, "use_clipped_model_output": True},
        noise="variance_noise",
    )
    assert peer.relative(*peer.compare(eta, "linear", "v", 10, "leading")) < 1e-9


def test_inversion_is_the_peers_rule_with_other_labels():
    assert peer.relative(*peer.inversion("from")) < 1e-9


def test_consistency_on_edm_is_the_peers_as_sigma_min_vanishes():
    assert peer.relative(*peer.edm_consistency(1e-6)) < 1e-9


def test_zero_terminal_snr_is_sampled_as_the_peer_does():
    assert peer.relative(*peer.zero_snr(diffusers.DDIMScheduler, solvers.ddim)) < 1e-9
    # a peer that replaces the 0 by 2^-24, which matters less where nothing is looked back at
    first_order = functools.partial(diffusers.DPMSolverMultistepScheduler, solver_order=1)
    assert peer.relative(*peer.zero_snr(first_order, solvers.dpmpp_1)) < 5e-4


@pytest.mark.parametrize("name", peer.SCHEDULES)
def test_schedules_are_the_peers(name):
    schedule, config = peer.SCHEDULES[name]
    theirs = peer.alphas_bar(**config)
    np.testing.assert_allclose(schedule.alphas_bar, theirs, rtol=1e-4)
    level = schedule(np.arange(1000))
    np.testing.assert_allclose(level.sigma, np.sqrt(1 - theirs), rtol=1e-3)  # 1 - alpha_bar in float32
    betas = 1 - np.append(schedule.alphas_bar[0], schedule.alphas_bar[1:] / schedule.alphas_bar[:-1])
    np.testing.assert_allclose(betas, diffusers.DDPMScheduler(**config).betas.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_terminal_snr_is_the_peers(name):
    schedule, config = peer.SCHEDULES[name]
    ours = schedules.zero_terminal_snr(schedule).alphas_bar
    theirs = peer.alphas_bar(diffusers.DDIMScheduler, **config, rescale_betas_zero_snr=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert ours[-1] == theirs[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_spacings_are_those_of_the_peers_ddim(spacing):
    schedule, scheduler, unequal = schedules.linear(), diffusers.DDIMScheduler(timestep_spacing=spacing), []
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        ours, theirs = solvers.times(schedule, steps, spacing), scheduler.timesteps.numpy()
        if not np.array_equal(ours, theirs):
            unequal.append(steps)
            if spacing == "trailing":  # the peer's arange adds up rounding: ties fall elsewhere, or a step too many
                assert (len(theirs) == steps + 1 and theirs[-1] == -1) or np.max(np.abs(ours - theirs)) == 1
    assert unequal[:5] == {"leading": [], "linspace": [1], "trailing": [48, 61, 96, 103, 112]}[spacing]
    assert len(unequal) < 120


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_karras_levels_are_the_peers(steps):
    schedule = schedules.linear()
    times, sigmas = peer.karras(diffusers.EulerDiscreteScheduler, steps)
    level = schedule(solvers.times(schedule, steps, "karras"))
    np.testing.assert_allclose(level.sigma / level.alpha, sigmas, rtol=1e-3)
    np.testing.assert_allclose(level.t, times, atol=0.05)


@pytest.mark.parametrize("steps", [2, 5, 10, 50])
def test_even_log_snr_is_the_peers_lu_lambdas(steps):
    schedule = schedules.linear()
    scheduler = diffusers.DPMSolverMultistepScheduler(**peer.SCHEDULES["linear"][1], use_lu_lambdas=True)
    scheduler.set_timesteps(steps)
    level = schedule(solvers.times(schedule, steps, "logsnr"))
    np.testing.assert_allclose(level.sigma / level.alpha, scheduler.sigmas.numpy()[:-1], rtol=1e-3)


def test_rescaled_guidance_is_the_peers_formula_on_x0():
    level = schedules.linear()(jnp.float32(500))

    def denoise(x, level, cond):
        x0 = jnp.tanh(x * cond)
        return Prediction(x0=x0, eps=(x - level.alpha * x0) / level.sigma)

    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 4, 4, 2)), jnp.float32)
    cond, null, scale = jnp.full((3, 1, 1, 1), 2.0), jnp.full((1, 1, 1), 0.5), 5.0
    ours = guidance.rescale(denoise, scale, null, phi=0.7)(x, level, cond)
    plain = guidance.classifier_free(denoise, scale, null)(x, level, cond)
    theirs = peer.rescale(np.array(plain.x0), np.array(denoise(x, level, cond).x0), 0.7)
    np.testing.assert_allclose(ours.x0, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(level.alpha * ours.x0 + level.sigma * ours.eps, x, rtol=1e-4, atol=1e-5)
