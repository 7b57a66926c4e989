"""Run functions of batches over any number of items."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from diffusion_jax import parallel
from diffusion_jax.data.batching import filled_batches

BATCH = 64


def mapped(function: Callable[..., PyTree], *columns: Sequence[np.ndarray] | np.ndarray) -> PyTree:
    """The outputs of a function for items, as numpy (items, ...). Batches have one size and are spread over this host's
    devices.

    function: arrays (batch, ...), one for each column -> a pytree of arrays (batch, ...).
    columns: of the same length, which is at least 1.
    """
    size, results = parallel.divisible(min(BATCH, len(columns[0]))), []
    for count, batch in filled_batches(zip(*columns, strict=True), size):
        outputs = function(*(parallel.spread(np.stack(column), size) for column in zip(*batch, strict=True)))
        results.append(jax.tree.map(lambda leaf: np.asarray(leaf)[:count], outputs))  # noqa: B023
    return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def map_over_hosts(
    work: Callable[[list], Iterable[np.ndarray]], items: Sequence, chunk: int, batch: int = 1
) -> Iterator[np.ndarray]:
    """Yield the output of `work` for each item, in order. Each of several hosts works on a share and gets all results.

    work: some items -> an array for each, all of one shape.
    chunk: items that a host works on at a time, a multiple of `batch`.
    batch: each share is filled up to a multiple of it with copies of its last item.
    """
    hosts = jax.process_count()
    for start in range(0, len(items), chunk * hosts):
        part = items[start : start + chunk * hosts]
        share = -(-len(part) // hosts)
        numbers = jax.process_index() + hosts * np.arange(share + -share % batch)
        results = list(work([part[min(i, len(part) - 1)] for i in numbers]))
        yield from (
            parallel.from_all_hosts(np.stack(results[:share]))
            .swapaxes(0, 1)
            .reshape(-1, *results[0].shape)[: len(part)]
        )
