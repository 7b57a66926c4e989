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
