"""The training state and one step: gradients averaged over devices, EMA, and skipping of bad updates."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree, UInt32

from diffusion_jax import parallel
from diffusion_jax.training import averages


class TrainState(NamedTuple):
    """Everything that a step changes.

    step: updates tried.
    ema: exponential moving average of params.
    key: root of all randomness, as plain integers. It never changes; step and example number are folded into it.
    bad_steps: updates skipped because loss or gradient was not finite.
    bad_in_row: how many of the latest updates in a row were skipped.
    averages: further averages of params, see `training.averages`; empty without.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    key: UInt32[Array, "..."]
    bad_steps: Int[Array, ""]
    bad_in_row: Int[Array, ""]
    averages: dict[str, PyTree]


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, seed: int, post_hoc: bool = False
) -> TrainState:
    """The state before the first step.

    params: float32 leaves.
    post_hoc: keep averages whose length is chosen after training.
    """
    step, bad_steps, bad_in_row = (jnp.zeros((), jnp.int32) for _ in range(3))  # no shared buffers: they are donated
    ema = jax.tree.map(jnp.copy, params)
    kept = averages.initial(params) if post_hoc else {}
    return TrainState(step, params, ema, optimizer.init(params), initial_key(seed), bad_steps, bad_in_row, kept)


def initial_key(seed: int) -> Array:
    """The root of all randomness of a run, as an array of numbers."""
    return jax.random.key_data(jax.random.key(seed))


def make_train_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    strategy: parallel.Strategy | None = None,
) -> Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict]]:
    """The compiled step (state, frozen, batch) -> (state, metrics), see `parallel.Strategy`.

    The randomness of an example depends only on the key, the step and its number in the global batch. So the gradient
    is the same for any number of devices and any strategy, up to rounding.

    loss: (params, frozen, batch, keys) -> (loss, metrics), a mean over examples. `frozen` also has "step" and "ema".
    ema_decay: in [0, 1). Decay of the average, lower early in training.
    accumulate: number of micro-batches of each device's share.
    strategy: `pmap` over all devices by default.
    metrics: loss, grad_norm, those of the loss, and the counts of skipped updates.
    """
    strategy = strategy or parallel.strategy()
    gradient = strategy.gradient(functools.partial(_gradient, loss, accumulate))

    def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict]:
        inputs = frozen | {"step": state.step, "ema": state.ema, "key": state.key}
        grads, metrics = gradient(state.params, inputs, batch)
        metrics["grad_norm"] = optax.global_norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # average over fewer steps at first, so that the initial weights are soon forgotten
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
        ema = optax.incremental_update(params, state.ema, 1 - decay)

        new_values = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, ema, opt_state, averages.updated(state.averages, params, state.step)),
            (state.params, state.ema, state.opt_state, state.averages),
        )
        bad_in_row = jnp.where(good, 0, state.bad_in_row + 1)
        counts = (state.bad_steps + jnp.where(good, 0, 1), bad_in_row)
        state = TrainState(state.step + 1, *new_values[:3], state.key, *counts, new_values[3])
        return state, metrics | {"bad_steps": state.bad_steps, "bad_in_row": bad_in_row}

    return strategy.compile(step)


def _gradient(
    loss: Callable,
    accumulate: int,
    params: PyTree,
    inputs: dict,
    batch: PyTree,
    numbers: Int[Array, "batch"],
    whole: Callable[[Callable], Callable],
) -> tuple[PyTree, dict]:
    """Gradient and metrics of a device's examples, as the mean over `accumulate` micro-batches.

    inputs: of the loss, with the step and the root of all randomness.
    numbers, whole: see `parallel.Strategy`.
    """
    step_key = jax.random.fold_in(jax.random.wrap_key_data(inputs["key"]), inputs["step"])
    keys = jax.vmap(lambda number: jax.random.fold_in(step_key, number))(numbers)
    loss = whole(loss)

    def gradient(micro: PyTree) -> tuple[PyTree, dict]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, inputs, *micro)
        return grads, metrics | {"loss": value}

    if accumulate == 1:
        return gradient((batch, keys))
    micros = jax.tree.map(lambda a: a.reshape(accumulate, -1, *a.shape[1:]), (batch, keys))
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, jax.tree.map(lambda a: a[0], micros))
    )
    total, _ = jax.lax.scan(lambda total, micro: (jax.tree.map(jnp.add, total, gradient(micro)), None), zeros, micros)
    return jax.tree.map(lambda a: a / accumulate, total)
