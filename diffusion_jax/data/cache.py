"""Outputs of frozen networks for a source (latents, text embeddings), computed once and kept on disk."""

import contextlib
import datetime
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from diffusion_jax import messages, paths
from diffusion_jax.data.batching import filled_batches
from diffusion_jax.data.cache_files import Arrays, Rows, Shards
from diffusion_jax.data.loader import Reader, ahead, stack
from diffusion_jax.data.order import selected
from diffusion_jax.data.sources import Source
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import Record, Transform

Field = Callable[[Record], Any]  # a stacked batch of B records -> array or dict of arrays (B, V, ...)
VERSION = 2  # changes with the form of the files and with what codecs store
STALE = 3600  # seconds after which an unfinished file that nobody writes to was left by a process that is gone


class Cache:
    """The outputs of the functions in `fields` for each record of a source, in `folder`/<SHA-256 of its key>.

    They are kept in shards, see `Shards`, which several processes may build at the same time. What was stopped goes on
    with the shards that are missing. A shard depends on its own records alone, so the result is always the same.

    source: the records. Bad ones are left out, with a warning.
    folder: a local one, for many caches.
    key_parts: JSON values, all that the result depends on besides the source: size, crop, networks, a hash of weights.
    fields: name -> function of a stacked batch, to V versions of each record.
    batch_size: rows of every batch. Incomplete ones are padded, so that a jitted function compiles once.
    transform: as in `loader`. Its random numbers depend only on the record's index.

    Raises ValueError for a folder in a bucket.
    """

    def __init__(
        self,
        source: Source,
        folder: str | os.PathLike,
        key_parts: dict,
        fields: dict[str, Field],
        batch_size: int,
        transform: Transform | None = None,
    ):
        parts = {"version": VERSION, "source": source.name, "fields": sorted(fields), **key_parts}
        key = json.dumps(parts, sort_keys=True)
        caches = paths.local(folder, "the folder of a cache")
        self.folder = caches / hashlib.sha256(key.encode()).hexdigest()
        self._source, self._fields, self._batch_size, self._transform = source, fields, batch_size, transform
        self._shards = Shards(self.folder, len(source))
        paths.write(self.folder / "key.json", key)
        _remove_unfinished(caches)

    @property
    def num_shards(self) -> int:
        """The number of shards of the finished cache."""
        return len(self._shards.ranges)

    def missing(self) -> list[int]:
        """The shards that are not there. A damaged one is missing, with a warning."""
        return self._shards.missing()

    def build(self, numbers: Sequence[int]) -> None:
        """Compute these shards. Logs their size at the start, and how long it takes after the first of them.

        Raises OSError, in one line, if the disk has no room. The shards that are there stay.
        """
        if not numbers:
            return
        start, is_announced = time.monotonic(), False
        with contextlib.closing(self._read(numbers)) as records:  # an error ends the line of the progress bar
            by_shard = itertools.groupby(records, lambda pair: self._shards.number_of(pair[0]))
            for done, (number, of_shard) in enumerate(by_shard):
                if done == 1:
                    left = (time.monotonic() - start) * (len(numbers) - 1)
                    logging.info("the rest of the cache takes about %s", datetime.timedelta(seconds=round(left)))
                with self._shards.written(number) as append:
                    for indices, rows in self._computed(of_shard):
                        if not is_announced:
                            self._announce(numbers, rows)
                            is_announced = True
                        append(indices, rows)

    def source(self) -> Source:
        """The records of the finished cache: {field: array or dict of arrays}. `read_batch` draws one of the versions
        of each, `read` takes the first.

        Raises ValueError if no record is good.
        """
        source, rows = self._source, Rows(self._shards)
        count, records = len(rows.records), rows.records
        if count < len(source):
            logging.warning("skipped %d of the %d records of %s", len(source) - count, len(source), source.name)
        if not count:
            raise ValueError(f"none of the {len(source)} records of {source.name} can be used")

        def read_batch(indices: np.ndarray, draws: np.ndarray) -> Record:
            return _nested(rows.read(indices, draws))

        return Source(
            name=f"{source.name}@{self.folder.name[:16]}",
            size=count,
            read=first_version(read_batch),
            read_batch=read_batch,
            num_classes=source.num_classes,
            classes=source.classes,
            captions=Captions(count, lambda row: source.captions[int(records[row])]) if source.captions else (),
            parts=selected(source.parts, records),
        )

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[int, Record | None]]:
        """Yield (index, record, or None for a bad one) of the records of some shards, with a progress bar."""
        source = self._source
        reader = Reader(source, self._transform, says_total=False)
        records = grain.MapDataset.range(len(source)).seed(0).random_map(lambda index, rng: (index, reader(index, rng)))
        indices = np.concatenate([self._shards.ranges[number] for number in numbers])
        of_shards = ahead(grain.MapDataset.source(indices).map(lambda index: records[int(index)]), 2 * self._batch_size)
        with tqdm(of_shards, desc=f"caching {source.name}", total=len(indices), unit="records") as bar:
            yield from bar

    def _computed(self, records: Iterator[tuple[int, Record | None]]) -> Iterator[tuple[list[int], Arrays]]:
        """Yield (indices of good records, their rows of each array), a batch at a time."""
        good = ((index, record) for index, record in records if record is not None)
        for count, batch in filled_batches(good, self._batch_size):
            stacked = stack([record for _, record in batch])
            arrays = _flat({name: field(stacked) for name, field in self._fields.items()})
            yield [index for index, _ in batch[:count]], {name: values[:count] for name, values in arrays}

    def _announce(self, numbers: Sequence[int], rows: Arrays) -> None:
        """Log the size of what is to be written. Raises OSError if it is too large for the disk. rows: some of it."""
        name, records = self._source.name, sum(len(self._shards.ranges[number]) for number in numbers)
        size = records * sum(values.nbytes / len(values) for values in rows.values())
        free = paths.free_space(self.folder)
        if size > free:
            raise OSError(
                f"the cache of {name} needs {messages.size(size)}, and {self.folder} has room for {messages.size(free)}"
                ": make room, or name another folder"
            )
        logging.info("caching %d records of %s, %s, in %s", records, name, messages.size(size), self.folder)


def first_version(read_batch: Callable[[np.ndarray, np.ndarray], Record]) -> Callable[[int], Record]:
    """index -> the first version of a record, by a `read_batch` of `Source`."""
    return lambda index: jax.tree.map(lambda leaf: leaf[0], read_batch(np.array([index]), np.zeros(1)))


def _remove_unfinished(caches: Path) -> None:
    """Remove what killed processes left in a folder of caches: files that nobody has written to for an hour."""
    for left in [*caches.glob("building-*"), *caches.glob("*/**/*.partial")]:
        parts = [left, *left.rglob("*")] if left.is_dir() else [left]
        with contextlib.suppress(FileNotFoundError):  # another process may have finished or removed it
            if time.time() - max(part.stat().st_mtime for part in parts) > STALE:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _flat(record: Record) -> Iterator[tuple[str, np.ndarray]]:
    """{"latent": array, "cond": {"text": array}} -> ("latent", array), ("cond/text", array)."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{part}", np.asarray(array)) for part, array in value.items())
        else:
            yield name, np.asarray(value)


def _nested(arrays: Arrays) -> Record:
    """The inverse of `_flat`."""
    record: Record = {}
    for name, values in arrays.items():
        field, _, part = name.partition("/")
        if part:
            record.setdefault(field, {})[part] = values
        else:
            record[field] = values
    return record
