"""Outputs of frozen networks for a source (latents, text embeddings), computed once and kept on disk."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

from diffusion_jax import paths
from diffusion_jax.data.batching import filled_batches
from diffusion_jax.data.loader import THREADS, Reader, stack
from diffusion_jax.data.order import selected
from diffusion_jax.data.sources import Captions, Source
from diffusion_jax.data.transforms import Record, Transform

Field = Callable[[Record], Any]  # a stacked batch -> array or dict of arrays, with batch_size rows


def cached(
    source: Source,
    folder: str | os.PathLike,
    key_parts: dict,
    fields: dict[str, Field],
    batch_size: int,
    transform: Transform | None = None,
) -> Source:
    """A source of {field: array or dict of arrays}, the outputs of the functions in `fields` for each record.

    Computed on the first call and kept in `folder`/<SHA-256 of source.name and key_parts>. Later calls map the files
    into memory. Each array is one .npy file. They appear all at once: an interrupted run leaves no partial cache.

    source: the records. Bad ones are skipped with a warning.
    key_parts: JSON values, all that the result depends on besides the source: size, crop, networks, a hash of weights.
    fields: name -> function of a stacked batch.
    batch_size: rows of every batch. The last one is padded, so that a jitted function compiles once.
    transform: as in `loader`. Its random numbers depend only on the record's index.

    Raises ValueError if the source is empty or has no good record.
    """
    key = json.dumps({"source": source.name, "fields": sorted(fields), **key_parts}, sort_keys=True)
    path = paths.local(folder, "the folder of a cache") / hashlib.sha256(key.encode()).hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix="building-", dir=path.parent))
        try:
            _build(source, building, fields, batch_size, transform)
            (building / "key.json").write_text(key)
            _publish(building, path)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return _open(path, source)


def _build(
    source: Source, folder: Path, fields: dict[str, Field], batch_size: int, transform: Transform | None
) -> None:
    """Write folder/field.npy or folder/field/part.npy for each array, and folder/index.npy, the indices of good
    records.
    """
    good_indices: list[int] = []
    files: dict[str, np.memmap] = {}
    for indices, batch in _batches(source, batch_size, transform):
        rows = slice(len(good_indices), len(good_indices) + len(indices))
        for name, field in fields.items():
            for file, values in _flatten(name, field(batch)):
                if file not in files:
                    (folder / file).parent.mkdir(exist_ok=True)
                    files[file] = open_memmap(folder / file, "w+", values.dtype, (len(source), *values.shape[1:]))
                files[file][rows] = values[: len(indices)]
        good_indices += indices
    for array in files.values():
        array.flush()
    np.save(folder / "index.npy", np.array(good_indices, np.int64))


def _batches(source: Source, batch_size: int, transform: Transform | None) -> Iterator[tuple[list[int], Record]]:
    """Yield (indices of good records, their batch padded to batch_size), with a progress bar."""
    reader = Reader(source, transform)
    reads = grain.MapDataset.range(len(source)).seed(0).random_map(lambda index, rng: (index, reader(index, rng)))
    read_options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=max(THREADS, 2 * batch_size))
    bar = tqdm(reads.to_iter_dataset(read_options), desc=f"caching {source.name}", total=len(source), unit="records")
    good = ((index, record) for index, record in bar if record is not None)
    for count, batch in filled_batches(good, batch_size):
        indices, records = zip(*batch, strict=True)
        yield list(indices[:count]), stack(records)


def _flatten(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """("latent", array) -> "latent.npy", array; ("cond", {"text": array}) -> "cond/text.npy", array."""
    if isinstance(value, dict):
        for part, array in value.items():
            yield f"{name}/{part}.npy", np.asarray(array)
    else:
        yield f"{name}.npy", np.asarray(value)


def _publish(building: Path, path: Path) -> None:
    """Move a finished folder to `path`. If another process finished first, keep its identical folder."""
    try:
        building.rename(path)
    except OSError:
        if not path.exists():
            raise


def _open(path: Path, source: Source) -> Source:
    """The source of the records in a finished folder."""
    index = np.load(path / "index.npy")
    arrays = {
        file.relative_to(path).with_suffix("").parts: np.load(file, mmap_mode="r")
        for file in path.rglob("*.npy")
        if file.name != "index.npy"
    }

    def read(row: int) -> Record:
        record: Record = {}
        for (field, *part), array in arrays.items():
            node = record.setdefault(field, {}) if part else record
            node[part[0] if part else field] = np.array(array[row])
        return record

    return Source(
        name=f"{source.name}@{path.name[:16]}",
        size=len(index),
        read=read,
        num_classes=source.num_classes,
        captions=Captions(len(index), lambda row: source.captions[int(index[row])]) if source.captions else (),
        parts=selected(source.parts, index),
    )
