"""From a source to batches, with Grain: shuffled, shared by processes, prefetched by threads, from any step."""

import itertools
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from diffusion_jax.data import order
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord, Record, Transform

MAX_WARNINGS = 10  # bad records that get a warning line of their own
# that read, one for each core that this process may use
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Tally:
    """How many records the threads of this process have read, ahead of the training, and how many bad ones they have
    skipped, each time counted that one was met.
    """

    def __init__(self):
        self._counts, self._lock = {"read": 0, "skipped": 0}, threading.Lock()

    def add(self, name: str, count: int = 1) -> None:
        with self._lock:
            self._counts[name] += count

    def __call__(self) -> dict[str, int]:
        with self._lock:
            return dict(self._counts)


class Reader:
    """(index, rng) -> the transformed record. For a bad record, a warning and None.

    Each of the first ten bad records gets a warning line. Their total follows when the whole source has been read,
    unless `says_total` is False. Raises ValueError if all records are bad. Thread-safe.
    """

    def __init__(self, source: Source, transform: Transform | None, says_total: bool = True):
        self.source, self.transform, self.says_total = source, transform, says_total
        self.visited, self.bad = np.zeros((2, len(source)), bool)
        self.lock = threading.Lock()

    def __call__(self, index: int, rng: np.random.Generator) -> Record | None:
        try:
            record = self.source[index]
            record = self.transform(record, rng) if self.transform else record
        except BadRecord as error:
            self._mark_visited(index, error)
            return None
        self._mark_visited(index)
        return record

    def _mark_visited(self, index: int, error: BadRecord | None = None) -> None:
        with self.lock:
            is_new = not self.visited[index]
            is_newly_bad = error is not None and not self.bad[index]  # a file may be deleted after its first use
            self.visited[index], self.bad[index] = True, error is not None
            if is_newly_bad and self.bad.sum() <= MAX_WARNINGS:
                logging.warning("skipped %s: %s", self.source.describe(index), error)
            if self.says_total and is_new and self.visited.all() and self.bad.any():
                logging.warning(
                    "skipped %d of the %d records of %s", self.bad.sum(), len(self.source), self.source.name
                )
            if error and self.bad.all():
                raise ValueError(f"none of the {len(self.source)} records of {self.source.name} can be used")


def stack(records: Sequence[Any]) -> Any:
    """Make a batch: numbers and arrays are stacked on a new first axis, dicts by key, other values as objects."""
    first = records[0]
    if isinstance(first, dict):
        return {key: stack([record[key] for record in records]) for key in first}
    if isinstance(first, int):
        return np.array(records, np.int32)
    if isinstance(first, np.ndarray | np.number):
        return np.stack(records)
    batch = np.empty(len(records), object)
    batch[:] = records
    return batch


def loader(
    source: Source,
    batch_size: int,
    seed: int,
    transform: Transform | None = None,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    tally: Tally | None = None,
) -> grain.DatasetIterator:
    """Endless batches for training, in a new order each epoch. Batches may cross from one epoch into the next.

    Step, seed and the size of the global batch decide the records of a step. The number of processes does not.

    source: the records. In the place of a bad one another is drawn, with a warning. If it reads whole batches, each
      record comes with one random number.
    batch_size: records in a batch of this process.
    transform: (record, numpy generator) -> record. None for a source that reads whole batches.
    start: number of steps before the first batch.
    process_index, process_count: each process takes its rows of the global batch.
    tally: counts the records.

    Raises ValueError if the source is empty or has no good record.
    """
    reader, indices, tally = Reader(source, transform), order.endless(source.parts, seed), tally or Tally()

    def read_good(index: int, rng: np.random.Generator) -> Record:
        for attempt in itertools.count():
            record = reader(index, rng)
            tally.add("skipped" if record is None else "read")
            if record is not None:
                return record
            index = order.replacement(source.parts, index, attempt, rng)

    def read_batch(step: int) -> Record:
        first = (step * process_count + process_index) * batch_size
        draws = np.random.default_rng([seed, step]).random((process_count, batch_size))[process_index]
        tally.add("read", batch_size)
        return source.read_batch(np.array([endless[first + i] for i in range(batch_size)]), draws)

    # one task of a thread makes a whole batch: handing over single records takes longer than reading cached ones
    if source.read_batch:
        endless = _repeated(indices)
        return iter(ahead(grain.MapDataset.range(start, sys.maxsize).map(read_batch), THREADS))
    # the crop of an image is drawn before the records are shared out, so it does not depend on the number of processes
    batches = _repeated(indices.random_map(read_good)).batch(batch_size, drop_remainder=True, batch_fn=stack)
    return iter(ahead(batches[start * process_count + process_index :: process_count], THREADS))


def _repeated(records: grain.MapDataset) -> grain.MapDataset:
    return records if len(records) == sys.maxsize else records.repeat()


def ahead(records: grain.MapDataset, count: int) -> grain.IterDataset:
    """The elements in their order, of which threads, one for each core, prepare up to `count` at the same time."""
    return records.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(THREADS, count)))


def one_epoch(
    source: Source, batch_size: int, transform: Transform | None = None, seed: int | None = None
) -> grain.DatasetIterator:
    """The batches of one pass over a source. The last one may be smaller.

    source: the records. Bad ones are skipped with a warning.
    seed: of the order. None keeps the source's.
    batch_size, transform: as in `loader`.

    Raises ValueError if the source has fewer records than a batch, or no good one.
    """
    if len(source) < batch_size:
        raise ValueError(f"{source.name} has {len(source)} records, too few for batches of {batch_size}")
    unshuffled = grain.MapDataset.range(len(source)).seed(0)
    records = (unshuffled if seed is None else order.one_pass(source.parts, seed)).random_map(Reader(source, transform))
    return iter(ahead(records, 2 * batch_size).batch(batch_size, drop_remainder=False, batch_fn=stack))
