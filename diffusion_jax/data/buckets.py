"""Pictures of several shapes: each is trained in the size nearest to its own shape, and a batch has one size
(NovelAI's aspect ratio bucketing, as in Podell et al. 2023, section 2.3).
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import grain
import numpy as np
import pyarrow as pa
from absl import logging
from jaxtyping import Int
from numpy.typing import ArrayLike
from tqdm import tqdm

from diffusion_jax.data import order, tables
from diffusion_jax.data.loader import ahead
from diffusion_jax.data.sources import Source
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import BadRecord, Record

GRAIN = 16  # a side of the square is at most twice as many steps from one size to the next, if they can be so small
AT_ONCE = 64  # pictures that are measured at the same time
TABLE = pa.schema([("height", pa.int32()), ("width", pa.int32())])

Shape = tuple[int, int]  # height and width, pixels
Batches = Callable[[int], Iterator[Record]]  # step -> the batches after it


def shapes(side: int, count: int, step: int) -> list[Shape]:
    """Sizes of about `side` * `side` pixels: the square, `count` wider ones and as many taller ones.

    The longer side grows by about a sixteenth of the square's. The shorter one is the largest that does not make more
    pixels than the square has. For Stable Diffusion XL, of 1024 pixels, they are among those it was trained in
    (Podell et al. 2023, appendix I).

    step: sides are multiples of it.
    Raises ValueError for more sizes than there are.
    """
    unit = step * max(1, side // (GRAIN * step))
    longer = [side // unit * unit + unit * number for number in range(1, count + 1)]
    wider = [(side * side // width // unit * unit, width) for width in longer]
    possible = sum(height > 0 for height, _ in wider)
    if possible < count:
        raise ValueError(f"config.data.buckets must be at most {possible} for images of {side} pixels, got {count}")
    return [(side, side), *wider, *((width, height) for height, width in wider)]


def sizes(source: Source, kept: Path) -> Int[np.ndarray, "records 2"]:
    """Height and width of the picture of each record, as its header tells them; 0 for bad records.

    They are read once for each content of a source, and kept in `kept`/sizes.
    source: one with `measure`.
    """
    base = kept / "sizes" / hashlib.sha256(source.name.encode()).hexdigest()[:32]
    with tables.alone(base):
        found = tables.stored(base)
        if not found:
            tables.store(base, TABLE, map(tuple, _measured(source)), lambda: {"source": source.name})
            found = tables.stored(base)
    return np.stack([found[0][name].to_numpy() for name in TABLE.names], axis=1)


def _measured(source: Source) -> Iterator[list[int]]:
    def measure(index: int) -> list[int]:
        try:
            return source.measure(index).tolist()
        except BadRecord:
            return [0, 0]

    records = ahead(grain.MapDataset.range(len(source)).map(measure), AT_ONCE)
    yield from tqdm(records, desc=f"measuring {source.name}", total=len(source), unit="records")


def assigned(
    measured: Int[np.ndarray, "records 2"], shapes: Sequence[Shape], least: int, name: str
) -> dict[Shape, Int[np.ndarray, "indices"]]:
    """The records to train on in each size, ascending: those whose ratio of sides is nearest to it, by its logarithm.

    measured: from `sizes`.
    least: records of a size. Where fewer are nearest to one, they join the next one, with a line in the log.
    name: of the source, in messages.
    Raises ValueError if no record has a size.
    """
    known = np.flatnonzero(measured.all(axis=1))
    if len(known) < len(measured):
        logging.warning("%s: left out %d pictures that cannot be used", name, len(measured) - len(known))
    if not len(known):
        raise ValueError(f"none of the {len(measured)} records of {name} can be used")
    of_shapes = _elongation(*np.array(shapes).T)
    ascending = np.argsort(of_shapes)
    halfway = (of_shapes[ascending][1:] + of_shapes[ascending][:-1]) / 2
    nearest = ascending[np.searchsorted(halfway, _elongation(*measured[known].T))]
    groups = {shape: known[nearest == number] for number, shape in enumerate(shapes) if np.any(nearest == number)}
    while len(groups) > 1 and len(groups[small := min(groups, key=lambda shape: len(groups[shape]))]) < least:
        joining = groups.pop(small)
        next_to = min(groups, key=lambda shape: abs(_elongation(*shape) - _elongation(*small)))
        logging.info(
            "%d pictures for %dx%d are fewer than a batch: they join those for %dx%d",
            *(len(joining), *small[::-1], *next_to[::-1]),
        )
        groups[next_to] = np.union1d(groups[next_to], joining)
    logging.info("pictures of each size: %s", ", ".join(f"{w}x{h} {len(of)}" for (h, w), of in groups.items()))
    return groups


def _elongation(height: ArrayLike, width: ArrayLike) -> ArrayLike:
    return np.log(width / height)


def chosen(source: Source, indices: Int[np.ndarray, "indices"]) -> Source:
    """The source with some of its records alone. indices: ascending."""
    digest, count = hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(), len(indices)

    def of(values: Callable[[int], object]) -> Callable[[int], object]:
        return lambda index: values(int(indices[index]))

    return replace(
        source,
        name=f"{source.name}/{digest[:16]}",
        size=count,
        read=of(source.read),
        captions=Captions(count, of(source.captions.__getitem__)) if source.captions else (),
        files=Captions(count, of(source.describe)),
        parts=order.within(source.parts, indices),
        measure=of(source.measure),
    )


def shares(groups: Sequence[Source], usable: Sequence[int]) -> list[int]:
    """How often each size is used, relative to the others: as often as its pictures are drawn.

    groups: the records of each size, from `chosen`.
    usable: how many of them turned out to be good.
    """
    pairs = zip(groups, usable, strict=True)
    return order.whole_weights([sum(part.weight for part in of.parts) * Fraction(n, len(of)) for of, n in pairs])


def in_turn(loaders: Sequence[Batches], weights: Sequence[int]) -> Batches:
    """Batches of several loaders, each as often as its weight says. The k-th use of a loader takes its k-th batch, so
    what a step sees depends on its number alone.
    """

    def batches(start: int) -> Iterator[Record]:
        running: dict[int, Iterator[Record]] = {}
        for step in itertools.count(start):
            number, before = order.turn(step, weights)
            if number not in running:
                running[number] = loaders[number](before)
            yield next(running[number])

    return batches
