"""The records of a source to measure with."""

from collections.abc import Iterator

import numpy as np

from diffusion_jax.data.loader import Reader
from diffusion_jax.data.order import one_pass
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import Record, Transform


def good_records(source: Source, transform: Transform, seed: int) -> Iterator[tuple[int, Record]]:
    """The records of a source that can be read, with their indices, in an order shuffled by the seed."""
    reader, rng = Reader(source, transform), np.random.default_rng(seed)
    in_blocks = any(part.blocks for part in source.parts)
    order = one_pass(source.parts, seed) if in_blocks else rng.permutation(len(source))
    records = ((int(index), reader(int(index), rng)) for index in order)
    return ((index, record) for index, record in records if record is not None)
