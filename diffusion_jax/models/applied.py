"""A Flax module as the function `apply` that training and sampling call."""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, PyTree


@dataclass(frozen=True)
class Applied:
    """module.apply. Equal modules compare equal, so they share compiled programs.

    The output has the channels of x: of a network that also predicts a variance (Nichol & Dhariwal 2021), the mean.
    """

    module: nn.Module

    def __call__(self, params: PyTree, x: Array, *inputs: PyTree) -> Array:
        return self.module.apply(params, x, *inputs)[..., : x.shape[-1]]
