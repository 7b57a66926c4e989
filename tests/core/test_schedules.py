import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import schedules

ALL = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "cosine": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "laplace": schedules.laplace,
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_variance_is_preserved_and_snr_falls(name, T):
    level = ALL[name](T)(np.arange(T))
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-14)
    assert np.all(np.diff(level.logsnr) < 0)
    assert np.all(level.sigma > 0) and np.all(level.alpha > 0)


def test_betas_come_back():
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas_bar = schedules.from_betas(betas).alphas_bar
    np.testing.assert_allclose(1 - alphas_bar[1:] / alphas_bar[:-1], betas[1:], rtol=1e-9)
    np.testing.assert_allclose(alphas_bar[-1], np.prod(1 - betas), rtol=1e-12)


def test_cosine_follows_its_formula_where_beta_is_not_clipped():
    def f(t):
        return np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2

    t = np.arange(990)
    np.testing.assert_allclose(schedules.cosine().alphas_bar[t], f(t + 1) / f(0), rtol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_device_agrees_with_host(name):
    schedule = ALL[name]()
    t = np.linspace(0, 999, 313)
    host, device = schedule(t), jax.jit(schedule)(jnp.asarray(t))
    np.testing.assert_allclose(device.alpha, host.alpha, rtol=2e-5)
    np.testing.assert_allclose(device.sigma, host.sigma, rtol=2e-5)
    assert device.alpha.dtype == jnp.float32 and host.alpha.dtype == np.float64


@pytest.mark.parametrize("name", ALL)
def test_time_of_logsnr_inverts_the_schedule(name):
    schedule = ALL[name]()
    t = np.linspace(0, 999, 313)
    np.testing.assert_allclose(schedule.t_of_logsnr(schedule(t).logsnr), t, atol=1e-6)
    assert schedule.t_of_logsnr(1e9) == schedule.t_min and schedule.t_of_logsnr(-1e9) == schedule.t_max


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.5, 1.0], [-0.1], [[0.1, 0.2]]])
def test_betas_outside_0_to_1_are_refused(betas):
    with pytest.raises(ValueError, match="inside"):
        schedules.from_betas(betas)


def test_no_steps_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        schedules.cosine(0)


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_first_step():
    """Lin et al. 2023, algorithm 1, written in betas as it is published."""
    plain = schedules.scaled_linear()
    schedule = schedules.zero_terminal_snr(plain)
    root = np.sqrt(plain.alphas_bar)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    level = schedule(np.arange(1000))
    np.testing.assert_allclose(level.alpha, expected, atol=1e-12)
    np.testing.assert_allclose(level.alpha**2 + level.sigma**2, 1, rtol=1e-12)
    assert level.alpha[-1] == 0 and level.sigma[-1] == 1 and level.logsnr[-1] == -np.inf


def test_zero_terminal_snr_has_fractions_on_its_last_step():
    schedule = schedules.zero_terminal_snr(schedules.linear())
    t = np.linspace(997, 998.999, 50)
    level = schedule(t)
    assert np.all(np.diff(level.alpha) < 0) and np.all(np.isfinite(level.logsnr))
    np.testing.assert_allclose(schedule.t_of_logsnr(level.logsnr), t, atol=1e-6)
    device = jax.jit(schedule)(jnp.asarray(t))
    np.testing.assert_allclose(device.alpha, level.alpha, atol=2e-5)


def test_edm_is_sigma_and_flow_is_a_straight_line():
    t = np.linspace(0.002, 80, 9)
    np.testing.assert_array_equal(schedules.edm()(t).sigma, t)
    np.testing.assert_array_equal(schedules.edm()(t).alpha, 1)
    u = np.linspace(0.001, 1, 9)
    np.testing.assert_allclose(schedules.flow()(u).sigma, u)
    shifted = schedules.flow(shift=3.0)(u)
    np.testing.assert_allclose(shifted.alpha + shifted.sigma, 1)
    np.testing.assert_allclose(shifted.sigma, 3 * u / (1 + 2 * u))


@pytest.mark.parametrize("schedule", [schedules.edm(), schedules.flow(), schedules.flow(shift=3.0)])
def test_continuous_times_come_back_from_logsnr(schedule):
    t = np.linspace(schedule.t_min, 0.99 * schedule.t_max, 50)
    np.testing.assert_allclose(schedule.t_of_logsnr(schedule(t).logsnr), t, rtol=1e-9)
    assert schedule.t_of_logsnr(np.float64(1e9)) == schedule.t_min
    assert schedule.t_of_logsnr(np.float64(-1e9)) == schedule.t_max


def test_laplace_has_its_distribution_of_logsnr():
    """The quantiles of Laplace(0, 1/2): uniform t, exponential tails."""
    logsnr = schedules.laplace(4000)(np.arange(4000)).logsnr
    np.testing.assert_allclose(np.quantile(logsnr, 0.75), 0.5 * np.log(2), rtol=1e-3)
    np.testing.assert_allclose(np.mean(np.abs(logsnr)), 0.5, rtol=1e-2)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: schedules.edm(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: schedules.flow(0.0), "shift of a flow schedule"),
        (lambda: schedules.laplace(10, scale=-1.0), "scale above 0"),
        (lambda: schedules.zero_terminal_snr(schedules.linear(1)), "at least 2 steps"),
    ],
)
def test_bad_schedules_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message):
        build()
