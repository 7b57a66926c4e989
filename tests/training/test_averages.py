"""Averages whose length is chosen after training."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training import averages


def weights_over_steps(length, step):
    """What an average kept from the start gives to each step, by its definition."""
    gamma = averages.exponent(length)
    tau = np.arange(1, step + 1)
    shares = tau ** (gamma + 1.0) - (tau - 1) ** (gamma + 1.0)
    return shares / step ** (gamma + 1.0)


@pytest.mark.parametrize("length", [0.02, 0.05, 0.1, 0.2, averages.LONGEST])
def test_the_length_is_the_deviation_of_the_weights(length):
    shares, tau = weights_over_steps(length, 100_000), np.arange(100_000) / 100_000
    assert shares.sum() == pytest.approx(1)
    mean = shares @ tau
    assert np.sqrt(shares @ (tau - mean) ** 2) == pytest.approx(length, rel=1e-3)


def test_the_running_average_has_these_weights():
    state = averages.initial({"w": jnp.zeros(30)})
    for step in range(30):
        state = averages.updated(state, {"w": jnp.eye(30)[step]}, jnp.int32(step))
    for name, average in state.items():
        np.testing.assert_allclose(average["w"], weights_over_steps(float(name), 30), rtol=0.2, atol=0.01)
        assert average["w"].sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15])
def test_any_length_is_made_of_the_saved_ones(length, tmp_path):
    """Of a run in which the weights move, against the average kept all along."""
    total, every = 400, 20
    rng = np.random.default_rng(0)
    path = np.cumsum(rng.normal(size=(total, 3)), axis=0) / total**0.5
    state = averages.initial({"w": jnp.zeros(3)})
    exact, gamma = np.zeros(3), averages.exponent(length)
    for step in range(total):
        state = averages.updated(state, {"w": jnp.asarray(path[step])}, jnp.int32(step))
        decay = (1 - 1 / (step + 1)) ** (gamma + 1)
        exact = decay * exact + (1 - decay) * path[step]
        if (step + 1) % every == 0:
            averages.save(tmp_path / "averages", step + 1, state)
    assert averages.steps(tmp_path / "averages") == list(range(every, total + 1, every))
    average = averages.load(tmp_path / "averages", total, length, {"w": jnp.zeros(3)})["w"]
    np.testing.assert_allclose(average, exact, atol=0.02)
    nearest = state[min(state, key=lambda name: abs(float(name) - length))]["w"]
    if f"{length:.2f}" not in state:
        assert np.abs(average - exact).max() < 0.5 * np.abs(nearest - exact).max()


def test_bad_input_is_named(tmp_path):
    like = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match=r"in \(0, 0.28\], a part of the run; got 0.5"):
        averages.exponent(0.5)
    with pytest.raises(FileNotFoundError, match=r"no averages of step 5 .* there are none: train with"):
        averages.load(tmp_path, 5, 0.1, like)
    averages.save(tmp_path, 5, averages.initial(like))
    with pytest.raises(ValueError, match=r"5.safetensors is of another model: it lacks 0.05/w of shape \(4,\)"):
        averages.load(tmp_path, 5, 0.1, {"w": jnp.zeros(4)})
    (tmp_path / "5.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"5.safetensors cannot be read: .*; remove it"):
        averages.load(tmp_path, 5, 0.1, like)


def save_constant(folder, steps):
    for step in steps:
        averages.save(folder, step, averages.initial({"w": jnp.ones(2)}))


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.15, 0.2, 0.25])
def test_weights_that_do_not_change_are_their_own_average(length, tmp_path):
    save_constant(tmp_path, range(50, 701, 50))  # as in docs/evaluation.md
    np.testing.assert_allclose(averages.load(tmp_path, 700, length, {"w": jnp.ones(2)})["w"], 1, rtol=1e-6)


@pytest.mark.parametrize(
    "steps, length, nearest", [((700,), 0.2, 0.13), ((700,), 0.01, 0.035), (range(50, 701, 50), 0.28, 0.265)]
)
def test_a_length_that_the_saved_ones_cannot_give_is_refused_with_the_nearest(steps, length, nearest, tmp_path):
    save_constant(tmp_path, steps)
    with pytest.raises(
        ValueError, match=rf"saved at {len(steps)} steps .* of length {length}: the nearest is"
    ) as error:
        averages.load(tmp_path, 700, length, {"w": jnp.ones(2)})
    assert f"the nearest is {nearest};" in str(error.value)
    averages.load(tmp_path, 700, nearest, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="cannot give"):
        averages.load(tmp_path, 700, nearest + np.sign(length - nearest) * 0.005, {"w": jnp.ones(2)})


@pytest.mark.parametrize("length", [0.03, 0.15, 0.2])
def test_the_factors_are_the_least_squares_among_those_that_sum_to_1(length):
    """Against the profiles at 100,000 points, and a Lagrange multiplier for the sum."""
    kept = [(step, averages.exponent(each)) for step in (200, 400, 700) for each in averages.LENGTHS]
    tau = (np.arange(100_000) + 0.5) * 700 / 100_000

    def profile(step, gamma):
        return np.where(tau < step, (gamma + 1) * np.minimum(tau / step, 1) ** gamma / step, 0)

    profiles, target = np.stack([profile(*average) for average in kept], axis=1), averages.exponent(length)
    gram = np.block([[profiles.T @ profiles, np.ones((6, 1))], [np.ones((1, 6)), np.zeros((1, 1))]])
    expected = np.linalg.solve(gram, [*(profiles.T @ profile(700, target)), 1])[:6]
    factors, (misfit,) = averages.combinations(kept, [(700, target)])
    np.testing.assert_allclose(factors[:, 0], expected, rtol=1e-3, atol=1e-3)
    difference = profiles @ expected - profile(700, target)
    assert misfit == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(profile(700, target)), rel=1e-3)
