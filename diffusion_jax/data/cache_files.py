"""Arrays of many records on disk, in shards. A shard is whole as soon as it is there."""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float, Int
from numpy.lib import format as npy

from diffusion_jax import paths
from diffusion_jax.messages import first_line

MOST = 64  # shards: what stops a build costs less than a 64th of it, and few files are open at a time
UNIT = 512  # the records of a shard are a multiple of it, so that full batches make most of them
INDEX = "index"

Arrays = dict[str, np.ndarray]  # by name, as "latent" or "cond/text"; (B, V, ...), V versions of each record
Append = Callable[[Sequence[int], Arrays], None]  # numbers of records and their rows


class Shard(NamedTuple):
    """skipped: numbers of the records that are left out. arrays: the rows of the others, mapped into memory."""

    skipped: list[int]
    arrays: Arrays


class Shards:
    """The shards in a folder. Each has what was computed for consecutive records.

    FOLDER/NAME/00003-of-00064.npy: rows of an array. Those of bfloat16 have the type of two bytes, which numpy knows.
    FOLDER/index/00003-of-00064.json: the numbers of records that are left out, and type and shape of each array. It is
    written last, so a shard with an index is whole.

    folder: a local one, made if it is missing.
    records: their number. It alone decides which shard a record is in.
    """

    def __init__(self, folder: Path, records: int):
        rows = UNIT * math.ceil(records / (UNIT * MOST))
        self.folder = folder
        self.ranges = [range(start, min(start + rows, records)) for start in range(0, records, rows)]
        (folder / INDEX).mkdir(parents=True, exist_ok=True)

    def number_of(self, record: int) -> int:
        """The shard of a record."""
        return record // len(self.ranges[0])

    def missing(self) -> list[int]:
        """The shards that are not there, or damaged."""
        next((self.folder / INDEX).iterdir(), None)  # makes a network file system look again
        return [number for number in range(len(self.ranges)) if self.open(number) is None]

    def open(self, number: int) -> Shard | None:
        """A shard. None if there is none, or, with a warning, if one of its files is damaged."""
        index_file = self._file(INDEX, number, ".json")
        if not index_file.exists():
            return None
        try:
            index = json.loads(index_file.read_text())
            rows = len(self.ranges[number]) - len(index["skipped"])
            arrays = {
                name: _mapped(self._file(name, number), jnp.dtype(dtype), (rows, *shape))
                for name, (dtype, shape) in index["arrays"].items()
            }
        except (EOFError, KeyError, OSError, TypeError, ValueError) as error:
            logging.warning("shard %s is computed again: it is damaged (%s)", index_file, first_line(error))
            return None
        return Shard(index["skipped"], arrays)

    @contextlib.contextmanager
    def written(self, number: int) -> Iterator[Append]:
        """Yield a function that appends rows to a shard, which is there when the context ends without an error.

        Raises OSError, in one line, if the disk is full or fails. The other shards stay as they are.
        """
        files: dict[str, _Growing] = {}
        good: set[int] = set()
        with contextlib.ExitStack() as stack:

            def append(numbers: Sequence[int], arrays: Arrays) -> None:
                with self._told_errors():
                    for name, values in arrays.items():
                        if name not in files:
                            file = self._file(name, number)
                            file.parent.mkdir(parents=True, exist_ok=True)
                            unfinished = stack.enter_context(paths.written(file))
                            files[name] = stack.enter_context(_Growing(unfinished, values.dtype, values.shape[1:]))
                        files[name].append(values)
                good.update(numbers)

            yield append
            with self._told_errors():
                stack.close()
                skipped = [record for record in self.ranges[number] if record not in good]
                arrays = {name: (file.dtype.name, file.shape) for name, file in files.items()}
                index = json.dumps({"skipped": skipped, "arrays": arrays})
                paths.write(self._file(INDEX, number, ".json"), index)

    @contextlib.contextmanager
    def _told_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise OSError(
                f"could not write to the cache {self.folder} ({reason}): its finished shards are kept; make room or "
                "name another folder, then run again"
            ) from error

    def _file(self, name: str, number: int, suffix: str = ".npy") -> Path:
        return self.folder / name / f"{number:05}-of-{len(self.ranges):05}{suffix}"


class Rows:
    """The rows of all shards, one after the other.

    shards: whole ones.
    records: (rows,). The number of the record of each row.
    """

    def __init__(self, shards: Shards):
        opened = [shards.open(number) for number in range(len(shards.ranges))]
        records = [np.setdiff1d(r, shard.skipped) for r, shard in zip(shards.ranges, opened, strict=True)]
        self.records = np.concatenate(records)
        self._starts = np.cumsum([0, *map(len, records)])
        self._shards = [shard.arrays for shard in opened]
        self._kinds = {name: (of.shape[2:], of.dtype) for arrays in self._shards for name, of in arrays.items()}

    def read(self, rows: Int[np.ndarray, "B"], draws: Float[np.ndarray, "B"]) -> Arrays:
        """Some rows of each array, (B, ...), one version of each. draws: in [0, 1), which version it is."""
        order = np.argsort(rows)
        bounds = np.searchsorted(rows[order], self._starts)
        values = {name: np.empty((len(rows), *shape), dtype) for name, (shape, dtype) in self._kinds.items()}
        for start, arrays, (first, end) in zip(self._starts, self._shards, itertools.pairwise(bounds), strict=False):
            places = order[first:end]
            for name, array in arrays.items() if len(places) else ():
                versions = (draws[places] * array.shape[1]).astype(int)
                values[name][places] = array[rows[places] - start, versions]
        return values


class _Growing:
    """A context for an .npy file to which rows are appended. numpy leaves room in the header for their final number."""

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]):
        self.dtype, self.shape = dtype, shape
        self._file, self._rows = path.open("wb"), 0
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.tobytes())
        self._rows += len(values)

    def __enter__(self) -> "_Growing":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with self._file:
            if kind is None:
                self._file.seek(0)
                self._write_header()
                self._file.flush()
                os.fsync(self._file.fileno())

    def _write_header(self) -> None:
        header = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self._rows, *self.shape)}
        npy.write_array_header_1_0(self._file, header)


def _mapped(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The array of an .npy file. Raises ValueError for a file that is cut off, or of another shape."""
    array = np.load(file, mmap_mode="r").view(np.ndarray).view(dtype)
    if array.shape != shape:
        raise ValueError(f"{file.name} of {file.parent.name} is {array.shape}, expected {shape}")
    return array
