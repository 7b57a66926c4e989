"""A Flax module as the function `apply` that training and sampling call, and the shapes of its variables."""

import functools
from dataclasses import dataclass

import flax.linen as nn
import jax
from jaxtyping import Array, PyTree


@dataclass(frozen=True)
class Applied:
    """module.apply. Equal modules compare equal, so they share compiled programs.

    The output has the channels of x: of a network that also predicts a variance (Nichol & Dhariwal 2021), the mean.
    """

    module: nn.Module

    def __call__(self, params: PyTree, x: Array, *inputs: PyTree) -> Array:
        return self.module.apply(params, x, *inputs)[..., : x.shape[-1]]


@functools.lru_cache(maxsize=32)
def shapes_of(module: nn.Module) -> PyTree:
    """The shapes of a module's variables, traced once for all equal modules. The module has `example_inputs`."""
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs()))
