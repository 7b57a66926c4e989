"""Denoisers: functions (x_t, level, cond) -> Prediction, and how to build one from a network."""

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
    """Make the denoiser a valid argument of a compiled function: wrap a plain function, return a pytree unchanged."""
    return Partial(denoise) if jax.tree_util.all_leaves([denoise]) else denoise


def denoiser(apply: Apply, params: PyTree, parameterization: Parameterization) -> Denoise:
    """Build a denoiser from a network.

    apply: (params, x (B, ...), t (B,), cond) -> output (B, ...). Pass the same object every time: the compiled program
      is looked up by it.
    params: pytree. The network's variables, an input of the compiled program.
    parameterization: the network's input and the meaning of its output, such as `parameterization.v`.
    """
    return Partial(_Network(apply, parameterization), params)


@dataclass(frozen=True)
class _Network:
    """A network and its parameterization. Equal pairs compare equal, so a new denoiser reuses the compiled program."""

    apply: Apply
    parameterization: Parameterization

    def __call__(self, params: PyTree, x: Array, level: NoiseLevel, cond: PyTree) -> Prediction:
        seen, t = self.parameterization.inputs(x, level)
        out = self.apply(params, seen, jnp.broadcast_to(t, x.shape[:1]), cond)
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


def _parameterizations(denoise: PyTree) -> set[Parameterization]:
    """The parameterizations of all networks inside a denoiser."""
    if not isinstance(denoise, Partial):
        return set()
    own = {denoise.func.parameterization} if isinstance(denoise.func, _Network) else set()
    return own.union(*(_parameterizations(argument) for argument in denoise.args))
