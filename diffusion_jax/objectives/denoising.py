"""Predict the noise (or x0, or v) by regression (Ho et al. 2020, algorithm 1)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key, PyTree

from diffusion_jax.core.guidance import completed
from diffusion_jax.core.process import add_noise
from diffusion_jax.model import DiffusionModel
from diffusion_jax.objectives.levels import Levels, Weight, uniform


def drop_condition(cond: PyTree, null_cond: PyTree, drop: float, keys: Key[Array, "batch"]) -> PyTree:
    """Replace each example's condition by the null one with probability `drop` (Ho & Salimans 2022, algorithm 1).

    cond: leaves (B, ...).
    null_cond: the same leaves without the batch axis. Leaves of cond that it lacks are never dropped.
    drop: probability, in [0, 1].
    keys: (B,), one for each example.
    """
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, drop))(keys)

    def choose(leaf: ArrayLike, null: ArrayLike) -> Array:
        leaf = jnp.asarray(leaf)
        return jnp.where(dropped.reshape(-1, *[1] * (leaf.ndim - 1)), jnp.asarray(null, leaf.dtype), leaf)

    return jax.tree.map(choose, cond, completed(null_cond, cond))


def data_and_noise(
    model: DiffusionModel, frozen: PyTree, batch: PyTree, x0_keys: Key[Array, "batch"], eps_keys: Key[Array, "batch"]
) -> tuple[Float[Array, "batch *shape"], Float[Array, "batch *shape"]]:
    """The data x0 and the noise eps, (B, ...) each, for a batch of records.

    frozen, batch: as the loss gets them.
    x0_keys, eps_keys: (B,) each.
    """
    x0 = model.codec.sample(frozen["codec"], batch["latent"], x0_keys)
    return x0, jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:]))(eps_keys)


def denoising(model: DiffusionModel, weight: Weight, drop: float, levels: Levels = uniform) -> Callable:
    """The loss of a denoiser, E weight(level) |target - network(x_t, t, cond)|^2 over levels and normal eps.

    model: its network is trained, with its schedule, parameterization and codec.

    weight: (level, parameterization) -> (B,), from `objectives.levels`.
    drop: probability of training without the condition, in [0, 1].
    levels: (schedule, keys (B,)) -> NoiseLevel of (B,), from `objectives.levels`.

    The loss takes params as split by `model.adapter`, frozen from `frozen_parts`, and batch = {"latent": record of the
    codec (B, ...), "cond": leaves (B, ...)}.
    """
    parameterization = model.parameterization

    def loss(params: PyTree, frozen: PyTree, batch: PyTree, keys: Key[Array, "batch"]) -> tuple[Float[Array, ""], dict]:
        x0_keys, level_keys, eps_keys, drop_keys, net_keys = jax.vmap(lambda key: jax.random.split(key, 5))(keys).T
        x0, eps = data_and_noise(model, frozen, batch, x0_keys, eps_keys)
        level = levels(model.schedule, level_keys)
        embedded = model.conditioning.embed(frozen["conditioning"], batch["cond"])
        cond = drop_condition(embedded, frozen["null_cond"], drop, drop_keys)

        x, t = parameterization.inputs(add_noise(x0, eps, level), level)
        out = model.network.apply(model.adapter.join(params, frozen["rest"]), x, t, cond, net_keys)
        error = jnp.mean(jnp.square(parameterization.target(x0, eps, level) - out), axis=range(1, x0.ndim))
        return jnp.mean(weight(level, parameterization) * error), {"mse": jnp.mean(error)}

    return loss


def frozen_parts(model: DiffusionModel, frozen_params: PyTree) -> dict:
    """The frozen inputs of the loss.

    frozen_params: the variables that `model.adapter` does not train.
    """
    conditioning = model.conditioning
    null_cond = {name: leaf for name, leaf in conditioning.null.items() if name != conditioning.sizes}
    return {
        "codec": model.codec.stats,
        "conditioning": conditioning.params(),
        "null_cond": null_cond,
        "rest": frozen_params,
    }
