"""Batches of one size, so that one compiled program serves all of them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def filled_batches(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """Yield (number of new items, batch of `size` items). The last batch is padded with its last item."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield len(batch), batch + batch[-1:] * (size - len(batch))
