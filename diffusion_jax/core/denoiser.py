"""Denoisers: functions (x_t, level, cond) -> Prediction, and how a network becomes one."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, PyTree

from diffusion_jax.core.parameterization import Parameterization
from diffusion_jax.core.process import NoiseLevel, Prediction
from diffusion_jax.core.schedules import NOISE_ALONE

Apply = Callable[..., Array]
Denoise = Callable[[Array, NoiseLevel, PyTree], Prediction]


def as_pytree(denoise: Denoise) -> Denoise:
    """A denoiser that can be an argument of a compiled function: a pytree as it is, a plain function wrapped."""
    return Partial(denoise) if jax.tree_util.all_leaves([denoise]) else denoise


def denoiser(apply: Apply, params: PyTree, parameterization: Parameterization) -> Denoise:
    """A denoiser from a network.

    apply: (params, x (B, ...), t (B,), cond) -> output (B, ...). Pass the same object every time, so that the program
      compiled for it is found again.
    params: pytree. The network's variables, an input of the compiled program.
    parameterization: what the network is given and what its output means, such as `parameterization.v`.
    """
    return Partial(_Network(apply, parameterization), params)


@dataclass(frozen=True)
class _Network:
    """A network and its parameterization; equal when both are, so that a new denoiser finds the compiled program."""

    apply: Apply
    parameterization: Parameterization

    def __call__(self, params: PyTree, x: Array, level: NoiseLevel, cond: PyTree) -> Prediction:
        seen, t = self.parameterization.inputs(x, level)
        out = self.apply(params, seen, jnp.broadcast_to(t, x.shape[:1]), cond)
        return self.parameterization.predict(x, out.astype(x.dtype), level)


def check_levels(denoise: PyTree, level: NoiseLevel) -> None:
    """Raise ValueError where a network inside the denoiser would be asked for x0 at a level that magnifies its errors.

    level: NoiseLevel of (R,). All levels that the denoiser will be evaluated at.
    """
    for parameterization in _parameterizations(denoise):
        with np.errstate(divide="ignore"):
            worst = np.max(parameterization.magnification(level), initial=0.0)
        if worst > 1.001 * NOISE_ALONE:  # a level found by its log-SNR differs by rounding
            raise ValueError(
                f"the plan evaluates the network at a level where an error of its answer becomes {worst:.0f} times as "
                f"large in x0, and at most {NOISE_ALONE:g} times is of use: build the plan on "
                "schedules.below(schedule), or use a network that predicts v or x0"
            )


def _parameterizations(denoise: PyTree) -> set[Parameterization]:
    """Those of all networks inside a denoiser."""
    if not isinstance(denoise, Partial):
        return set()
    own = {denoise.func.parameterization} if isinstance(denoise.func, _Network) else set()
    return own.union(*(_parameterizations(argument) for argument in denoise.args))
