"""Denoisers: functions (x_t, level, cond, to) -> Prediction, and how to build one from a network.

`to` is the level that the step goes to. It is passed by name to denoisers that have a parameter `to`.

- An ordinary denoiser ignores it. Its prediction is the tangent of the path at x_t, which is right for small steps.
- A flow map predicts the pair (x0, eps) for which alpha_to x0 + sigma_to eps is the state at `to`, however far away
  `to` is (Boffi et al. 2025, arXiv 2505.18825).
- A consistency model is a flow map whose `to` is clean data.
"""

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.schedules import NOISE_ALONE

Apply = Callable[..., Array]
Denoise = Callable[..., Prediction]


def as_pytree(denoise: Denoise) -> Denoise:
    """Make the denoiser a valid argument of a compiled function, and callable with `to=`.

    A plain function is wrapped. So is a function without a parameter `to`, which is then called without it.
    """
    wrapped = Partial(denoise) if jax.tree_util.all_leaves([denoise]) else denoise
    return wrapped if _takes_target(denoise) else Partial(_without_target, wrapped)


def _takes_target(denoise: Denoise) -> bool:
    """Whether the function inside all partial applications has a parameter `to`."""
    while isinstance(denoise, functools.partial):
        denoise = getattr(denoise.func, "fun", denoise.func)  # JAX hides a partial application in another one
    return "to" in inspect.signature(denoise).parameters


def _without_target(
    denoise: Denoise, x: Array, level: NoiseLevel, cond: PyTree, to: NoiseLevel | None = None
) -> Prediction:
    return denoise(x, level, cond)


def target_time(to: NoiseLevel) -> ArrayLike:
    """The time of a target as flow maps see it: 1000 (2 / pi) arctan(sigma / alpha).

    It is 0 for clean data and 1000 for pure noise, the same on every schedule.
    """
    return 1000 * 2 / math.pi * jnp.arctan2(jnp.asarray(to.sigma, jnp.float32), jnp.asarray(to.alpha, jnp.float32))


def denoiser(apply: Apply, params: PyTree, parameterization: Parameterization, flow_map: bool = False) -> Denoise:
    """Build a denoiser from a network.

    apply: (params, x (B, ...), t (B,), cond) -> output (B, ...). Pass the same object every time: the compiled program
      is looked up by it.
    params: pytree. The network's variables, an input of the compiled program.
    parameterization: the network's input and the meaning of its output, such as `parameterization.v`.
    flow_map: pass the time of the target level in cond["to"], (B,), see `target_time`. Without a target, it is the time
      of the level of x.
    """
    return Partial(_Network(apply, parameterization, flow_map), params)


@dataclass(frozen=True)
class _Network:
    """A network and its parameterization. Equal pairs compare equal, so a new denoiser reuses the compiled program."""

    apply: Apply
    parameterization: Parameterization
    flow_map: bool

    def __call__(
        self, params: PyTree, x: Array, level: NoiseLevel, cond: PyTree, to: NoiseLevel | None = None
    ) -> Prediction:
        inputs, t = self.parameterization.inputs(x, level)
        if self.flow_map:
            cond = cond | {"to": jnp.broadcast_to(target_time(level if to is None else to), x.shape[:1])}
        out = self.apply(params, inputs, jnp.broadcast_to(t, x.shape[:1]), cond)
        return self.parameterization.predict(x, out.astype(x.dtype), level)


def check_levels(denoise: PyTree, level: NoiseLevel) -> None:
    """Raise ValueError if a network inside the denoiser is evaluated at a level that magnifies its errors in x0.

    level: NoiseLevel of (R,). All levels at which the denoiser will be evaluated.
    """
    for parameterization in _parameterizations(denoise):
        with np.errstate(divide="ignore"):
            worst = np.max(parameterization.magnification(level), initial=0.0)
        if worst > 1.001 * NOISE_ALONE:  # a level found by its log-SNR differs by rounding
            raise ValueError(
                f"the plan evaluates the network at a level that magnifies its error {worst:.0f} times in x0; "
                f"expected at most {NOISE_ALONE:g} times: build the plan on "
                "schedules.below(schedule), or use a network that predicts v or x0"
            )


def check_rows(denoise: PyTree, to: NoiseLevel, x0: ArrayLike, eps: ArrayLike, past: ArrayLike) -> None:
    """Raise ValueError for rows that use a flow map's prediction at another level than the one it is for.

    to: NoiseLevel of (R,), the targets.
    x0, eps, past: coefficients of the rows, see `solvers.Plan`.
    """
    if not any(network.flow_map for network in _networks(denoise)):
        return
    if np.any(past) or not np.allclose(x0 * to.sigma, eps * to.alpha, rtol=1e-6, atol=1e-9):
        raise ValueError(
            "a model of few steps predicts where a step ends: its solver must be ddim with eta=0, or consistency"
        )


def _parameterizations(denoise: PyTree) -> set[Parameterization]:
    """The parameterizations of all networks inside a denoiser."""
    return {network.parameterization for network in _networks(denoise)}


def _networks(denoise: PyTree) -> set[_Network]:
    """All networks inside a denoiser."""
    if not isinstance(denoise, Partial):
        return set()
    outer = {denoise.func} if isinstance(denoise.func, _Network) else set()
    return outer.union(*(_networks(argument) for argument in denoise.args))
