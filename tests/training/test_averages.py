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
