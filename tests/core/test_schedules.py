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


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@pytest.mark.parametrize("T", [1, 8, 10, 50, 100, 250, 3000])
def test_any_number_of_steps_ends_as_noisy_as_a_thousand(name, T):
    """And is as noisy on the way there."""
    few, many = ALL[name](T), ALL[name](1000)
    assert few.num_steps == T
    np.testing.assert_allclose(few.alphas_bar[-1], many.alphas_bar[-1], rtol=1e-12)
    if 1000 % T == 0:
        np.testing.assert_allclose(few.alphas_bar, many.alphas_bar[1000 // T - 1 :: 1000 // T], rtol=1e-12)
    if T % 1000 == 0:
        np.testing.assert_allclose(few.alphas_bar[T // 1000 - 1 :: T // 1000], many.alphas_bar, rtol=1e-12)


def test_few_steps_have_nearly_the_betas_scaled_by_hand():
    """1000 / T times those of 1000 steps, as in Dhariwal & Nichol 2021."""
    by_hand = schedules.from_betas(np.linspace(1e-4 * 4, 0.02 * 4, 250))
    np.testing.assert_allclose(schedules.linear(250).alphas_bar, by_hand.alphas_bar, atol=0.02)


@pytest.mark.parametrize("ends", [(1e-4, 0.02), (5e-4, 0.01)])
def test_a_thousand_steps_have_the_betas_that_are_given(ends):
    def assert_equal(schedule, betas):
        np.testing.assert_array_equal(schedule.logsnr_table, schedules.from_betas(betas).logsnr_table)

    assert_equal(schedules.linear(1000, *ends), np.linspace(*ends, 1000))
    assert_equal(schedules.scaled_linear(1000, *ends), np.linspace(ends[0] ** 0.5, ends[1] ** 0.5, 1000) ** 2)


CUT = {
    "cosine": schedules.cosine(),
    "sigmoid": schedules.sigmoid(),
    "cosine of 50 steps": schedules.cosine(50),
    "zero terminal SNR": schedules.zero_terminal_snr(schedules.scaled_linear()),
    "flow": schedules.flow(),
    "shifted flow": schedules.flow(shift=3.0),
    "wide edm": schedules.edm(0.002, 1000.0),
}


@pytest.mark.parametrize("name", CUT)
@pytest.mark.parametrize("ratio", [2.0, 200.0])
def test_below_leaves_out_the_times_that_are_too_noisy_and_no_others(name, ratio):
    whole = CUT[name]
    cut = schedules.below(whole, ratio)
    assert cut.t_min == whole.t_min and cut.t_max < whole.t_max
    t = np.linspace(cut.t_min, cut.t_max, 313)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), cut(t), whole(t))
    level = cut(cut.t_max)
    assert level.sigma <= ratio * level.alpha * (1 + 1e-12)
    if whole.num_steps:
        beyond = whole(cut.t_max + 1)
        assert beyond.sigma > ratio * beyond.alpha and cut.num_steps == cut.t_max + 1
    else:
        np.testing.assert_allclose(level.sigma / level.alpha, ratio, rtol=1e-12)


def test_below_is_the_schedule_itself_where_nothing_is_too_noisy():
    for schedule in (schedules.linear(), schedules.scaled_linear(), schedules.edm()):
        assert schedules.below(schedule) is schedule
    for schedule in CUT.values():
        assert schedules.below(schedule, np.inf) is schedule


@pytest.mark.parametrize("name", CUT)
def test_parts_of_the_way_are_times(name):
    schedule, parts = CUT[name], np.linspace(1 / 500, 1, 500)
    times = schedule.at(parts)
    assert schedule.t_min <= times[0] and times[-1] == pytest.approx(schedule.t_max, rel=1e-12)
    assert (np.diff(times) > 0).all()
    np.testing.assert_allclose(schedule.at(jnp.asarray(parts)), times, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CUT)
def test_the_part_of_the_way_is_known_from_the_time(name):
    schedule, parts = CUT[name], np.linspace(1 / 500, 1, 500)
    np.testing.assert_allclose(schedule.fraction_of(schedule.at(parts)), parts, rtol=1e-9)


def test_the_whole_way_is_no_further_than_the_last_time():
    for sigma_max in np.arange(1.0, 100.0).tolist():
        assert schedules.edm(sigma_max=sigma_max).at(1.0) <= sigma_max


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


@pytest.mark.parametrize("shift", [0.1, 0.3, 0.45, 1.0, 3.0, 7.0])
def test_flow_ends_on_noise_alone_exactly(shift):
    schedule = schedules.flow(shift)
    for level in (schedule(1.0), jax.jit(schedule)(jnp.float32(1))):
        assert level.alpha == 0 and level.sigma == 1


def test_the_network_of_a_flow_sees_its_time_in_thousandths():
    t = np.linspace(0.001, 1, 9)
    np.testing.assert_allclose(schedules.flow(shift=3.0)(t).t, 1000 * t)
    np.testing.assert_allclose(jax.jit(schedules.flow())(jnp.asarray(t)).t, 1000 * t, rtol=1e-6)


@pytest.mark.parametrize("schedule", [schedules.edm(), *(schedules.flow(shift) for shift in (0.3, 1.0, 3.0))])
def test_continuous_times_come_back_from_logsnr(schedule):
    t = np.linspace(schedule.t_min, 0.99 * schedule.t_max, 50)
    np.testing.assert_allclose(schedule.t_of_logsnr(schedule(t).logsnr), t, rtol=1e-9)
    assert schedule.t_of_logsnr(np.float64(1e9)) == schedule.t_min
    assert schedule.t_of_logsnr(np.float64(-1e9)) == schedule.t_max


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: schedules.edm(1.0, 0.5), "0 < sigma_min < sigma_max"),
        (lambda: schedules.flow(0.0), "shift of a flow schedule"),
        (lambda: schedules.zero_terminal_snr(schedules.linear(1)), "at least 2 steps"),
        (lambda: schedules.linear(0), "at least 1"),
        (lambda: schedules.linear(10, 0.0, 0.02), "inside"),
        (lambda: schedules.below(schedules.edm(0.5, 2.0), 0.1), "at least 0.5, .* got 0.1"),
        (lambda: schedules.below(schedules.cosine(), 0.001), "least noisy time, got 0.001"),
    ],
)
def test_bad_schedules_are_one_clear_line(build, message):
    with pytest.raises(ValueError, match=message):
        build()
