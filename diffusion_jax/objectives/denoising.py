"""Predict the noise (or x0, or v) by plain regression (Ho et al. 2020, algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core import process
from diffusion_jax.core.process import NoiseLevel
from diffusion_jax.core.schedules import Schedule

TARGETS = {
    "eps": lambda x0, eps, level: eps,
    "x0": lambda x0, eps, level: x0,
    "v": process.velocity,
    "flow": lambda x0, eps, level: eps - x0,
}


def drop_condition(cond: PyTree, null_cond: PyTree, drop: float, keys: Key[Array, "batch"]) -> PyTree:
    """Replace each example's condition by the null one with probability `drop` (Ho & Salimans 2022, algorithm 1).

    cond: leaves (B, ...). null_cond: the same leaves without the batch axis.
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, drop))(keys)

    def choose(leaf: Array, null: Array) -> Array:
        return jnp.where(dropped.reshape(-1, *[1] * (leaf.ndim - 1)), null.astype(leaf.dtype), leaf)

    return jax.tree.map(choose, cond, null_cond)


def _time(schedule: Schedule, key: Key[Array, ""]) -> Array:
    """A time of training: one of 0..T-1, or anywhere in [t_min, t_max] where time is continuous."""
    if schedule.num_steps:
        return jax.random.randint(key, (), 0, schedule.num_steps)
    return jax.random.uniform(key, (), minval=schedule.t_min, maxval=schedule.t_max)


def denoising(
    apply: Callable[..., Array],
    draw: Callable[[PyTree, PyTree, Array], Array],
    schedule: Schedule,
    prediction: str,
    weight: Callable[[NoiseLevel, str], Array],
    drop: float,
) -> Callable:
    """The loss E weight(t) |target - network(x_t, t, cond)|^2 over t uniform and eps normal.

    apply: (params, x (B, ...), t (B,), cond, dropout key) -> output (B, ...). draw: (frozen codec, record (B, ...),
    keys (B,)) -> x0 (B, ...), a draw of the latent that a record holds, or the pixels as they are. prediction: a key of
    TARGETS.
    weight: from `core.process`. drop: probability of training without the condition.
    The loss takes frozen = {"codec": what `draw` needs, "null_cond": leaves without the batch axis} and
    batch = {"latent": (B, ...), "cond": leaves (B, ...)}.
    """

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        draw_keys, t_keys, eps_keys, drop_keys, net_keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys).T
        x0 = draw(frozen["codec"], batch["latent"], draw_keys)
        t = jax.vmap(lambda key: _time(schedule, key))(t_keys)
        eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(eps_keys)
        cond = drop_condition(batch["cond"], frozen["null_cond"], drop, drop_keys)

        level = schedule(t)
        out = apply(params, process.add_noise(x0, eps, level), level.t, cond, net_keys[0])
        error = jnp.mean(jnp.square(TARGETS[prediction](x0, eps, level) - out), axis=range(1, x0.ndim))
        return jnp.mean(weight(level, prediction) * error), {"mse": jnp.mean(error)}

    return loss
