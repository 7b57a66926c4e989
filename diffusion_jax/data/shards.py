"""Sources of shards: files that hold many records each, on a local disk or in a bucket."""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from absl import logging
from tqdm import tqdm

from diffusion_jax import paths
from diffusion_jax.data import array_record_shards, parquet_shards, tables, tar_shards
from diffusion_jax.data.copies import Copies
from diffusion_jax.data.folders import DECODER
from diffusion_jax.data.order import WINDOW, Part
from diffusion_jax.data.rows import Row
from diffusion_jax.data.scanning import in_processes
from diffusion_jax.data.sources import Source
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import BadRecord, Record, picture, size_of
from diffusion_jax.messages import first_line

FORM = 2  # changes whenever an index of the same shards says something else
OPEN = 128  # shards that are open at a time
ATTEMPTS = 10  # to open a copy that others may remove
SHOWN = 3  # problems in a message
LARGE = 1 << 30  # bytes of shards that are worth several processes


class Kind(NamedTuple):
    """How shards of one kind are read.

    scan: shard -> its records. Raises ValueError if it is not of this kind.
    opened: file -> a function (offset, size) of a `Row` -> the bytes of the picture, its path, or None.
    unpack: (shard, file) -> writes the file for `opened`; None if that reads the shard itself.
    """

    scan: Callable[[paths.Path], Iterator[Row]]
    opened: Callable[[Path], Callable[[int, int], bytes | str | None]]
    unpack: Callable[[paths.Path, Path], None] | None = None


KINDS = {
    "tar": Kind(tar_shards.scan, tar_shards.opened),
    "parquet": Kind(parquet_shards.scan, parquet_shards.opened, parquet_shards.unpack),
    "array_record": Kind(array_record_shards.scan, array_record_shards.opened),
}
INDEX = pa.schema(
    [
        ("shard", pa.int32()),
        ("name", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("captions", pa.list_(pa.string())),
        ("label", pa.string()),
    ]
)


def shards(kind: str, pattern: str, folder: Path, limit: float, side: int = 0, sharing: int = 1) -> Source:
    """The records of shards, with captions or labels.

    The first use makes an index of all shards, which is kept in `folder`/index. Shards in a bucket are copied to
    `folder`/shards when they are read, those of Parquet are unpacked there.

    kind: one of `KINDS`; their modules describe the records.
    pattern: a path with * and ? for the names of shards, or ** for folders.
    limit: bytes of all shards in the folder.
    side: of the crops that are made of the pictures, see `picture`.
    sharing: how many sources, of those that `are_copied`, are read by turns. Each has the same part of the limit.

    Labels that are all whole numbers stay what they are. Other labels are names, numbered in their sorted order. A
    record without a caption, among others with captions, has the empty one, with a warning. One without a label, among
    others with labels, is a bad record, or if the records have captions, no labels are used. What is no record, such as
    texts without a picture, is left out with a warning.

    Raises FileNotFoundError if no file matches, and ValueError for a file of another kind, a shard without a record,
    and a limit that is too small for the shards that are read together.
    """
    found, how = _found(pattern), KINDS[kind]
    facts = [kind, FORM, DECODER, [[path.name, size, version] for path, size, version in found]]
    name = f"{kind}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
    files = [path for path, _, _ in found]
    local, announce = _local_files(how, found, folder / "shards" / name, limit, sharing)
    base = folder / "index" / name
    with tables.alone(base):
        table, facts = tables.stored(base) or _index(base, files, _scanned(how, found, local))
    _warn(name, facts)
    sizes, most = facts["records"], _most_open(found, limit / sharing) if announce else OPEN
    encoded = _pictures(how, files, local, table, most)
    return Source(
        name=name,
        size=sum(sizes),
        read=_reader(encoded, table, facts, side),
        num_classes=facts["num_classes"],
        classes=facts["classes"] or (),
        captions=_captions(table, facts["captions"]),
        files=Captions(sum(sizes), lambda index: _place(files, table, index)),
        parts=(Part(sum(sizes), blocks=sizes, announce=announce),) if announce else (),
        measure=lambda index: size_of(encoded(index)),
    )


def are_copied(kind: str, pattern: str) -> bool:
    """Whether shards are read from copies: those of Parquet, and all in a bucket."""
    return _are_copied(KINDS[kind], pattern)


def _are_copied(how: Kind, where: str | paths.Path) -> bool:
    return how.unpack is not None or paths.in_bucket(where)


def _found(pattern: str) -> list[tuple[paths.Path, int, str]]:
    """The shards that match a pattern, with size and version."""
    found = paths.matching(pattern)
    if not found:
        advice = "name files and no folder, with * for what differs, as DATA/*.tar"
        raise FileNotFoundError(f"no shards match {pattern!r}; {advice}")
    return found


def _local_files(
    how: Kind, found: list[tuple[paths.Path, int, str]], folder: Path, limit: float, sharing: int
) -> tuple[Callable[[int], Path], Callable[[Sequence[int]], None] | None]:
    """(number of a shard -> the file for `Kind.opened`, what is called with the shards to be read next). Without the
    second, all shards lie ready.
    """
    files, sizes = [path for path, _, _ in found], [size for _, size, _ in found]
    if not _are_copied(how, files[0]):
        return files.__getitem__, None
    needed = sum(sorted(sizes)[-2 * WINDOW :]) * sharing
    if needed > limit:
        others = f", as much for each of {sharing} sources" if sharing > 1 else ""
        raise ValueError(
            f"config.data.cache_gb must be at least {needed / 1e9:.3g}, for the {min(2 * WINDOW, len(files))} shards "
            f"in {files[0].parent} that are in use at a time{others}, got {limit / 1e9:.3g}"
        )
    write = how.unpack or paths.download
    copies = Copies(folder, sizes, lambda number, file: write(files[number], file), limit)
    return copies, copies.announce


def _most_open(found: list[tuple[paths.Path, int, str]], limit: float) -> int:
    """How many copies are open at a time: not many more than fit, because a removed one takes its space until it is
    closed, but a window more, because one that is read must not be copied again.
    """
    return min(OPEN, WINDOW + int(limit // max(size for _, size, _ in found)))


def _scanned(
    how: Kind, found: list[tuple[paths.Path, int, str]], local: Callable[[int], Path]
) -> Iterator[Iterable[Row]]:
    """The records of each shard. Many bytes are read by several processes."""
    files = [path for path, _, _ in found]
    if paths.in_bucket(files[0]) and not how.unpack:
        return (_scanned_copy(how, file, local(number)) for number, file in enumerate(files))
    if sum(size for _, size, _ in found) < LARGE:
        return (how.scan(file) for file in files)
    return in_processes(how.scan, files)


def _scanned_copy(how: Kind, shard: paths.Path, copy: Path) -> Iterator[Row]:
    """The records of a shard in a bucket. Errors name the shard."""
    try:
        yield from how.scan(copy)
    except ValueError as error:
        raise ValueError(str(error).replace(str(copy), str(shard))) from error


def _index(base: Path, files: Sequence[paths.Path], scanned: Iterator[Iterable[Row]]) -> tuple[pa.Table, dict]:
    """Store the table of all records, and the facts about them.

    scanned: the records of each file.
    """
    try:
        paths.try_writing(base.parent)
    except OSError as error:
        reason = f"cannot keep the index of shards in {base.parent} ({first_line(error)})"
        raise OSError(f"{reason}; name another folder by config.data.cache") from error
    facts = {"records": [], "captions": 0, "uncaptioned": 0, "unlabelled": 0, "left_out": 0, "problems": []}
    labels: set[str] = set()

    def rows() -> Iterator[tuple]:
        bar = tqdm(zip(files, scanned, strict=True), desc=f"reading {base.name}", total=len(files), unit="shards")
        for number, (file, found) in enumerate(bar):
            count, problems = 0, []
            for row in found:
                if row.problem:
                    facts["left_out"] += 1
                    problems = [*problems, f"{file} {row.name}: {row.problem}"][:SHOWN]
                    continue
                count += 1
                facts["captions"] = max(facts["captions"], len(row.captions))
                facts["uncaptioned"] += not any(row.captions)
                facts["unlabelled"] += row.label is None
                labels.update([row.label] if row.label is not None else [])
                yield number, row.name, row.offset, row.size, row.captions, row.label
            if not count:
                raise ValueError("; ".join([f"{file} has no records", *problems[:1]]))
            facts["records"].append(count)
            facts["problems"] = [*facts["problems"], *problems][:SHOWN]

    tables.store(base, INDEX, rows(), lambda: facts | _classes(labels, facts))
    return tables.stored(base)


def _classes(labels: set[str], facts: dict) -> dict:
    """The number of classes, and their names, None if labels are numbers. Captions and some labels are captions."""
    if facts["captions"] and facts["unlabelled"]:
        return {"num_classes": 0, "classes": None}
    if all(label.isascii() and label.isdecimal() for label in labels):
        return {"num_classes": max(map(int, labels), default=-1) + 1, "classes": None}
    return {"num_classes": len(labels), "classes": sorted(labels)}


def _warn(name: str, facts: dict) -> None:
    total = sum(facts["records"])
    if facts["left_out"]:
        logging.warning("%s: left out %d entries: %s", name, facts["left_out"], "; ".join(facts["problems"]))
    if facts["captions"] and facts["uncaptioned"]:
        logging.warning("%s: %d of %d records have no caption, or an empty one", name, facts["uncaptioned"], total)
    if 0 < facts["unlabelled"] < total:
        what = "they are not used" if facts["num_classes"] else "classes are not used, only captions"
        logging.warning("%s: %d of %d records have no class: %s", name, facts["unlabelled"], total, what)


def _captions(table: pa.Table, most: int) -> Sequence[str | tuple[str, ...]]:
    """The captions of each record; tuples if some record has several."""
    column = table["captions"]

    def read(index: int) -> str | tuple[str, ...]:
        captions = tuple(column[index].as_py()) or ("",)
        return captions if most > 1 else captions[0]

    return Captions(len(column), read) if most else ()


def _pictures(
    how: Kind, files: Sequence[paths.Path], local: Callable[[int], Path], table: pa.Table, most: int
) -> Callable[[int], bytes | paths.Path]:
    """index -> the encoded picture, or its path. most: shards that are open at a time."""
    shard, offset, size = (table[name] for name in ("shard", "offset", "size"))

    @functools.lru_cache(most)
    def opened(number: int) -> Callable[[int, int], bytes | str | None]:
        for attempt in range(ATTEMPTS):
            try:
                return how.opened(local(number))
            except FileNotFoundError:  # a copy that another process has removed since
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def encoded(index: int) -> bytes | paths.Path:
        number = shard[index].as_py()
        found = opened(number)(offset[index].as_py(), size[index].as_py())
        if found is None:
            raise BadRecord("no picture")
        return found if isinstance(found, bytes) else files[number].parent / found

    return encoded


def _reader(
    encoded: Callable[[int], bytes | paths.Path], table: pa.Table, facts: dict, side: int
) -> Callable[[int], Record]:
    """index -> record. side: see `picture`."""
    numbers = {name: number for number, name in enumerate(facts["classes"] or ())}
    captions, labels = _captions(table, min(facts["captions"], 1)), table["label"]

    def read(index: int) -> Record:
        record = picture(encoded(index), side)
        if captions:
            record["caption"] = captions[index]
        if facts["num_classes"]:
            label = labels[index].as_py()
            if label is None:
                raise BadRecord("no class")
            record["label"] = numbers[label] if numbers else int(label)
        return record

    return read


def _place(files: Sequence[paths.Path], table: pa.Table, index: int) -> str:
    return f"{files[table['shard'][index].as_py()]} {table['name'][index].as_py()}"
