"""One step: the same gradient however the batch is divided, and updates that are not finite leave no trace."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_jax import parallel
from diffusion_jax.training import step as steps
from tests.training import linear
from tests.training.test_parallel import in_eight_devices


@functools.cache
def compiled(optimizer: Callable, rate: float, ema: float, accumulate: int, devices: int):
    strategy = parallel.strategy("pmap", jax.devices()[:devices])
    return strategy, steps.make_train_step(linear.loss, optimizer(rate), ema, accumulate, strategy)


def run(batch, accumulate=1, count=1, devices=1, state=None, optimizer=optax.sgd, rate=1.0):
    """The state after `count` steps on one batch and the last metrics. By default a step's change is the gradient."""
    strategy, train_step = compiled(optimizer, rate, 0.5, accumulate, devices)
    state = steps.init_state(linear.initial(), optimizer(rate), 0) if state is None else state
    state, frozen = strategy.place(state), strategy.place(linear.FROZEN)
    for _ in range(count):
        state, metrics = train_step(state, frozen, strategy.split(batch))
    return state, jax.device_get(metrics)


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b)


def eight_devices_are_one():
    """Runs in a process of its own, where the host shows 8 devices."""
    assert jax.device_count() == 8
    batch = linear.batch(32)
    alone, alone_metrics = run(batch)
    for devices, accumulate in [(8, 1), (8, 4), (2, 2)]:
        state, metrics = run(batch, accumulate, devices=devices)
        assert_close(state.params, alone.params)
        assert_close(metrics, alone_metrics)
    # one device's broken example is every device's skipped step
    batch["y"][3] = np.nan
    state, metrics = run(batch, devices=8)
    assert_close(state.params, linear.initial())
    assert metrics["bad_steps"] == 1


def test_gradient_on_eight_devices_is_that_of_one():
    in_eight_devices(eight_devices_are_one)


def test_the_step_is_the_gradient_of_the_whole_batch():
    batch = linear.batch(16)
    root = jax.random.fold_in(jax.random.key(0), 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(jnp.arange(16))
    grads = jax.grad(lambda p: linear.loss(p, linear.FROZEN, batch, keys)[0])(linear.initial())
    state, metrics = run(batch)
    assert_close(state.params, jax.tree.map(jnp.subtract, linear.initial(), grads))
    np.testing.assert_allclose(metrics["grad_norm"], optax.global_norm(grads), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 16])
def test_micro_batches_are_one_batch(accumulate):
    batch = linear.batch(16)
    whole, divided = run(batch), run(batch, accumulate)
    assert_close((divided[0].params, divided[1]), (whole[0].params, whole[1]))


def test_steps_draw_fresh_noise_and_repeat_with_the_seed():
    batch = linear.batch(8)
    (_, first), (_, second), (_, again) = (run(batch, count=count, rate=0.0) for count in (1, 2, 1))
    assert first["loss"] != second["loss"]
    assert first["loss"] == again["loss"]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(poison, accumulate):
    good, broken = linear.batch(8), linear.batch(8)
    broken["y"][5] = poison
    options = {"accumulate": accumulate, "optimizer": optax.adam, "rate": 0.1}
    state, _ = run(good, count=2, **options)
    before = jax.device_get((state.params, state.ema, state.opt_state))

    state, metrics = run(broken, count=3, state=state, **options)
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.ema, state.opt_state), before)
    assert (state.step, state.bad_steps, state.bad_in_row) == (5, 3, 3)
    assert (metrics["bad_steps"], metrics["bad_in_row"]) == (3, 3)

    state, metrics = run(good, state=state, **options)
    assert (state.step, state.bad_steps, state.bad_in_row) == (6, 3, 0)
    assert (metrics["bad_steps"], metrics["bad_in_row"]) == (3, 0)
    assert not np.array_equal(state.params["w"], before[0]["w"])


def test_a_loss_may_read_the_step_and_the_average():
    def loss(params, frozen, batch, keys):
        return jnp.sum(params["w"]), {"step": frozen["step"], "gap": jnp.sum(frozen["ema"]["w"] - params["w"])}

    strategy = parallel.strategy()
    train_step = steps.make_train_step(loss, optax.sgd(1.0), 0.5)
    state, frozen = strategy.place((steps.init_state(linear.initial(), optax.sgd(1.0), 0), {}))
    for i in range(4):
        gap = float(jnp.sum(state.ema["w"] - state.params["w"]))
        state, metrics = train_step(state, frozen, strategy.split(linear.batch(8)))
        assert metrics["step"] == i and abs(metrics["gap"] - gap) < 1e-5
    assert gap > 0.5, "the average lags behind"


def test_the_average_warms_up():
    """ema <- d ema + (1 - d) params with d = min(decay, (1 + i) / (10 + i)) at step i = 0, 1, ..."""
    batch, expected, state = linear.batch(8), linear.initial()["w"], None
    for i in range(12):
        decay = min(0.5, (1 + i) / (10 + i))  # the minimum changes sides at i = 8
        state, _ = run(batch, state=state)
        expected = decay * expected + (1 - decay) * state.params["w"]
        np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-5)
