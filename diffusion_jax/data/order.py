"""The order in which the records of a source are drawn: a pure function of the seed and the position.

Records that can be read one by one are shuffled as a whole. Where they are quickest read together, such as those of a
shard in a bucket, blocks of them are shuffled, and the records within a window of a few blocks.
"""

import bisect
import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import grain
import numpy as np

WINDOW = 4  # blocks whose records are shuffled together
PERMUTED = 1 << 20  # records of which a permutation is kept in memory; grain computes it, slowly for few records
NEAR, IN_PART = 10, 100  # attempts to replace a bad record from its block, and then from its part


@dataclass(frozen=True, eq=False)
class Part:
    """Consecutive records of a source, in an order of their own.

    size: number of records.
    weight: how often they are drawn, compared with the other parts of the source.
    blocks: numbers of records of consecutive blocks; empty if the records can be read one by one.
    whole: whether it is all of a source; False if others of its records are drawn elsewhere.
    announce: called with the numbers of the blocks to be read next, in this order, whenever a window begins.
    """

    size: int
    weight: Fraction = Fraction(1)
    blocks: Sequence[int] = ()
    whole: bool = True
    announce: Callable[[Sequence[int]], None] = lambda numbers: None


def endless(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """Position -> index of a record. In each epoch of a part, every record is drawn once; parts are drawn by weight.

    The data set has the length of an epoch if that repeats, else sys.maxsize.
    """
    if len(parts) == 1 and not parts[0].blocks:
        return grain.MapDataset.range(parts[0].size).seed(seed).shuffle()
    return grain.MapDataset.range(sys.maxsize).seed(seed).map(_by_weight(parts, seed))


def one_pass(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """Position -> index of a record, every record once."""
    size = sum(part.size for part in parts)
    if not any(part.blocks for part in parts):
        return grain.MapDataset.range(size).seed(seed).shuffle()
    by_size = [replace(part, weight=Fraction(part.size)) for part in parts]
    return grain.MapDataset.range(size).seed(seed).map(_by_weight(by_size, seed))


def replacement(parts: Sequence[Part], index: int, attempt: int, rng: np.random.Generator) -> int:
    """Another record in the place of a bad one: at first from the same block, then from the same part, then any.

    attempt: how many were tried already.
    """
    start, stop = 0, sum(part.size for part in parts)
    if attempt < IN_PART:
        part, start, stop = _around(index, [part.size for part in parts])
        if attempt < NEAR and parts[part].blocks:
            _, first, last = _around(index - start, parts[part].blocks)
            start, stop = start + first, start + last
    return start + int(rng.integers(stop - start))


def selected(parts: Sequence[Part], indices: np.ndarray) -> tuple[Part, ...]:
    """The parts of a source that has only some of the records, and reads them one by one.

    indices: of these records in the old source, ascending.
    Raises ValueError if a whole part has none of them.
    """
    check(parts, indices)
    pairs = zip(parts, _divided(parts, indices), strict=True)
    return tuple(Part(len(of_part), part.weight) for part, of_part in pairs if len(of_part))


def check(parts: Sequence[Part], usable: np.ndarray) -> None:
    """Raise ValueError if a whole part has no usable record. usable: ascending indices."""
    for number, (part, of_part) in enumerate(zip(parts, _divided(parts, usable), strict=True), start=1):
        if part.whole and not len(of_part):
            raise ValueError(f"none of the {part.size} records of source {number} can be used")


def within(parts: Sequence[Part], indices: np.ndarray) -> tuple[Part, ...]:
    """The parts of a source that has only some of the records, each in the order of the whole: those of a block stay
    together. A part that keeps a tenth of its records keeps a tenth of its weight.

    indices: of these records in the old source, ascending.
    """
    pairs = zip(parts, _divided(parts, indices), strict=True)
    return tuple(_within(part, of_part) for part, of_part in pairs if len(of_part))


def _divided(parts: Sequence[Part], indices: np.ndarray) -> list[np.ndarray]:
    """Ascending indices in a source, as those within each of its parts."""
    stops = list(itertools.accumulate(part.size for part in parts))
    pieces = np.split(indices, np.searchsorted(indices, stops[:-1]))
    return [piece - stop + part.size for piece, stop, part in zip(pieces, stops, parts, strict=True)]


def _within(part: Part, indices: np.ndarray) -> Part:
    size = len(indices)
    part = replace(part, size=size, weight=part.weight * Fraction(size, part.size), whole=size == part.size)
    if not part.blocks:
        return part
    counts = np.diff(np.searchsorted(indices, np.cumsum([0, *part.blocks])))
    kept = np.flatnonzero(counts).tolist()

    def announce(numbers: Sequence[int]) -> None:
        part.announce([kept[number] for number in numbers])

    return replace(part, blocks=counts[kept].tolist(), announce=announce)


def whole_weights(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportions."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    return [int(weight * scale) for weight in weights]


def turn(position: int, weights: Sequence[int]) -> tuple[int, int]:
    """(which of several parts has a position, how many positions before it are of the same part).

    The positions of a part are spread evenly: the first n positions have its share of n, rounded.
    weights: of the parts, above 0. After as many positions as their sum each part has had exactly its weight.
    """
    before, after, remaining = position, position + 1, sum(weights)
    for number, weight in enumerate(weights):
        # how many of the first positions are left for the later parts
        rest_before, rest_after = (count * (remaining - weight) // remaining for count in (before, after))
        if rest_before == rest_after:
            return number, before - rest_before
        before, after, remaining = rest_before, rest_after, remaining - weight
    raise AssertionError("one part has the position")


def _around(index: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """(number, start, stop) of the piece with a record, for consecutive pieces of these sizes."""
    ends = list(itertools.accumulate(sizes))
    number = bisect.bisect_right(ends, index)
    return number, ends[number] - sizes[number], ends[number]


def _by_weight(parts: Sequence[Part], seed: int) -> Callable[[int], int]:
    """position -> index."""
    weights = whole_weights([part.weight for part in parts])
    orders = [_in_part(part, [seed, number]) for number, part in enumerate(parts)]
    starts = [0, *itertools.accumulate(part.size for part in parts)]

    def index(position: int) -> int:
        number, before = turn(position, weights)
        return starts[number] + orders[number](before)

    return index


def _in_part(part: Part, seeds: list[int]) -> Callable[[int], int]:
    """position -> index within a part."""
    if part.blocks or part.size <= PERMUTED:
        return _in_windows(part, part.blocks or [part.size], seeds)
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    return grain.MapDataset.range(part.size).shuffle(seed=seed).__getitem__


def _in_windows(part: Part, blocks: Sequence[int], seeds: list[int]) -> Callable[[int], int]:
    """position -> index within a part whose blocks are shuffled, and then the records of each window."""
    sizes = np.asarray(blocks)
    starts = np.cumsum(sizes) - sizes

    @functools.lru_cache(maxsize=2)
    def windows(epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The blocks of each window of an epoch, and the positions at which windows end."""
        order = np.random.default_rng([*seeds, epoch]).permutation(len(sizes))
        groups = np.split(order, range(WINDOW, len(order), WINDOW))
        return groups, np.cumsum([sizes[group].sum() for group in groups])

    @functools.lru_cache(maxsize=4)
    def records(epoch: int, window: int) -> np.ndarray:
        groups, _ = windows(epoch)
        following = groups[window + 1] if window + 1 < len(groups) else windows(epoch + 1)[0][0]
        part.announce([*groups[window].tolist(), *following.tolist()])
        ranges = [np.arange(starts[block], starts[block] + sizes[block]) for block in groups[window]]
        return np.random.default_rng([*seeds, epoch, window]).permutation(np.concatenate(ranges))

    def index(position: int) -> int:
        epoch, place = divmod(position, part.size)
        _, ends = windows(epoch)
        window = int(np.searchsorted(ends, place, side="right"))
        return int(records(epoch, window)[place - (ends[window - 1] if window else 0)])

    return index
