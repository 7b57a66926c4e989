"""A Flax module as the function `apply` that training and sampling call."""

from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, PyTree


@dataclass(frozen=True)
class Applied:
    """module.apply. Equal modules compare equal, so they share compiled programs."""

    module: nn.Module

    def __call__(self, params: PyTree, *inputs: PyTree) -> Array:
        return self.module.apply(params, *inputs)
