"""Batches of one size, so that one compiled program serves all of them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def filled_batches(items: Iterable[Item], size: int) -> Iterator[tuple[int, list[Item]]]:
    """(how many items are new, a batch of `size` items); the last batch is filled up with its last item."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield len(batch), batch + batch[-1:] * (size - len(batch))
