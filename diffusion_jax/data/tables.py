"""Tables on disk: Arrow files, mapped into memory so that their size costs none, with facts beside them."""

import contextlib
import fcntl
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from diffusion_jax import paths

BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Captions(Sequence):
    """Captions, or other values of records, that are read only when they are used."""

    size: int
    read: Callable[[int], Any]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int | slice) -> Any:
        indices = range(self.size)[index]
        return self.read(indices) if isinstance(indices, int) else [self.read(i) for i in indices]


def store(base: Path, schema: pa.Schema, rows: Iterable[tuple], facts: Callable[[], dict]) -> None:
    """Write base.arrow, then base.json. Each appears whole, and the second says that the table is complete.

    rows: values in the order of the schema. They are written in batches and need not fit into memory.
    facts: JSON values about the table. Called after the last row.
    """
    base.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(rows)
    with paths.written(f"{base}.arrow") as file, pa.ipc.new_file(str(file), schema) as out:
        while batch := list(itertools.islice(remaining, BATCH_ROWS)):
            columns = zip(*batch, strict=True)
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            out.write_batch(pa.record_batch(arrays, schema=schema))
    paths.write(f"{base}.json", json.dumps(facts()))


@contextlib.contextmanager
def alone(base: Path) -> Iterator[None]:
    """Wait for other processes that are here, of this host or of others with the same disk: the first one makes what
    the others then find. On a disk without locks, or that cannot be written, nobody waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            base.parent.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(f"{base}.lock", "w")), fcntl.LOCK_EX)
            for left in base.parent.glob(f"{base.name}.*.partial"):  # by a process that was killed
                left.unlink()
        yield


def stored(base: Path) -> tuple[pa.Table, dict] | None:
    """The table and the facts of `store`, or None if they are not there."""
    try:
        facts = json.loads(Path(f"{base}.json").read_text())
        return mapped(Path(f"{base}.arrow")), facts
    except (OSError, ValueError, pa.ArrowException):
        return None


def mapped(file: Path) -> pa.Table:
    """The table in an Arrow file, mapped into memory."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
