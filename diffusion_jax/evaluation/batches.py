"""Functions of batches, run over any number of items."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from diffusion_jax import parallel
from diffusion_jax.data.batching import filled_batches

BATCH = 64


def mapped(function: Callable[..., PyTree], *columns: Sequence[np.ndarray] | np.ndarray) -> PyTree:
    """What a function makes of items, as numpy (items, ...): in batches of one size, spread over this host's devices.

    function: arrays (batch, ...), one for each column -> a pytree of arrays (batch, ...).
    columns: of the same length, which is at least 1.
    """
    size, found = parallel.divisible(min(BATCH, len(columns[0]))), []
    for count, batch in filled_batches(zip(*columns, strict=True), size):
        made = function(*(parallel.spread(np.stack(column), size) for column in zip(*batch, strict=True)))
        found.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:count], made))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
