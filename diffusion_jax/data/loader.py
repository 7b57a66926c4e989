"""From a source to batches, with Grain: shuffled, sharded, prefetched by threads, resumable at the exact record."""

import threading
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import logging

from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord, Record, Transform

MAX_WARNINGS = 10  # bad records that get a warning line of their own


class Reader:
    """(index, rng) -> the transformed record. For a bad record, a warning and None.

    Each of the first ten bad records gets a warning line. Their total follows when the whole source has been read.
    Raises ValueError if all records are bad. Thread-safe.
    """

    def __init__(self, source: Source, transform: Transform | None):
        self.source, self.transform = source, transform
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
            if self.visited[index]:
                return
            self.visited[index] = True
            if error:
                self.bad[index] = True
                if self.bad.sum() <= MAX_WARNINGS:
                    logging.warning("skipped %s: %s", self.source.describe(index), error)
            if self.visited.all() and self.bad.any():
                logging.warning(
                    "skipped %d of the %d records of %s", self.bad.sum(), len(self.source), self.source.name
                )
                if self.bad.all():
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
    process_index: int = 0,
    process_count: int = 1,
    transform: Transform | None = None,
    shuffle: bool = True,
    repeat: bool = True,
) -> grain.DatasetIterator:
    """An iterator of batches, the same for the same seed. get_state() and set_state() resume it exactly.

    source: the records. Bad ones are skipped with a warning.
    batch_size: records in a batch of this process.
    process_index, process_count: this process takes every process_count-th record of the common order.
    transform: (record, numpy generator) -> record.
    shuffle: use a new order each epoch.
    repeat: loop forever; batches may cross from one epoch into the next. If False, one epoch without a partial batch.

    Raises ValueError if the source is empty, is smaller than a batch, or has no good record.
    """
    records = len(source) // process_count
    if records == 0 or (records < batch_size and not repeat):
        raise ValueError(
            f"{source.name} has {len(source)} records, too few for {process_count} x batches of {batch_size}"
        )
    indices = grain.MapDataset.range(len(source)).seed(seed)
    indices = indices.shuffle() if shuffle else indices
    # Before sharding, so that the crop of an image does not depend on the number of processes.
    dataset = indices.random_map(Reader(source, transform))
    dataset = dataset.repeat() if repeat else dataset[: records * process_count]
    dataset = dataset[process_index::process_count]
    read_options = grain.ReadOptions(num_threads=8, prefetch_buffer_size=max(8, 2 * batch_size))
    return iter(dataset.to_iter_dataset(read_options).batch(batch_size, drop_remainder=True, batch_fn=stack))
