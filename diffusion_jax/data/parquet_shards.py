"""Parquet files with a column of pictures, as `datasets` and img2dataset write them.

The pictures of a row group are compressed together, so that one alone cannot be read. A shard is therefore unpacked
once into an Arrow file, which is mapped into memory.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diffusion_jax import paths
from diffusion_jax.data import tables
from diffusion_jax.data.rows import CAPTIONS, LABELS, Row, described, first_of
from diffusion_jax.messages import first_line

PICTURES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "image_bytes", "bytes")
FILES = ("file_name", "image_path", "image_file", "image", "path")  # columns of text: the paths of pictures
PICTURES_AT_ONCE, TEXTS_AT_ONCE = 64, 8192  # rows
UNPACKED = pa.schema([("bytes", pa.large_binary()), ("path", pa.string())])


def scan(shard: paths.Path) -> Iterator[Row]:
    """The records of a shard, without a look at the pictures.

    Raises ValueError if it is not Parquet or has no column of pictures.
    """
    number = 0
    for batch in _batches(shard, _descriptions, TEXTS_AT_ONCE):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for row in range(batch.num_rows):
            yield _row(number, {name: column[row] for name, column in columns.items()})
            number += 1


def unpack(shard: paths.Path, file: Path) -> None:
    """Write the pictures of a shard, or their paths, into an Arrow file for `opened`."""
    with pa.ipc.new_file(str(file), UNPACKED) as out:
        for batch in _batches(shard, lambda schema: [_picture(schema)], PICTURES_AT_ONCE):
            parts = [part.cast(field.type) for part, field in zip(_parts(batch.column(0)), UNPACKED, strict=True)]
            out.write_batch(pa.record_batch(parts, schema=UNPACKED))


def opened(file: Path) -> Callable[[int, int], bytes | str | None]:
    """A function (number of the record, unused) -> the bytes of its picture, or else its path, or None. Thread-safe.

    file: from `unpack`.
    """
    table = tables.mapped(file)
    contents, places = table["bytes"], table["path"]
    return lambda number, _: contents[number].as_py() or places[number].as_py()


def _batches(shard: paths.Path, columns: Callable[[pa.Schema], list[str]], rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a shard, some rows at a time."""
    try:
        # in this thread alone: the end of the program would wait for threads of Arrow that read from a file of Python
        with paths.at(shard).open("rb") as file, pq.ParquetFile(file, pre_buffer=False) as parquet:
            schema = parquet.schema_arrow
            if _picture(schema) is None:
                found = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise ValueError(f"{shard}: expected one column of pictures, such as image or jpg, got {found}"[:500])
            yield from parquet.iter_batches(rows, columns=columns(schema), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard}: expected Parquet, got an error: {first_line(error)}") from error


def _descriptions(schema: pa.Schema) -> list[str]:
    """The columns with captions and classes."""
    return [name for names in (CAPTIONS, LABELS) if (name := first_of(names, schema.names))]


def _picture(schema: pa.Schema) -> str | None:
    """The column with pictures or, without one, that with their paths."""
    names = [field.name for field in schema if _is_bytes(field.type) or _is_struct(field.type)]
    texts = [field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    return first_of(PICTURES, names) or (names[0] if len(names) == 1 else first_of(FILES, texts))


def _is_struct(kind: pa.DataType) -> bool:
    """Whether a column is an Image of `datasets`."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == set(UNPACKED.names)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _parts(pictures: pa.Array) -> list[pa.Array]:
    """The bytes and the paths of pictures. Those of one kind have none of the other."""
    if _is_struct(pictures.type):
        return [pc.struct_field(pictures, name) for name in UNPACKED.names]
    nothing = pa.nulls(len(pictures))
    return [pictures, nothing] if _is_bytes(pictures.type) else [nothing, pictures]


def _row(number: int, fields: dict[str, pa.Scalar]) -> Row:
    name = f"row {number}"
    try:
        return Row(name, number, **described(fields, lambda value: value.as_py()))
    except ValueError as error:
        return Row(name, problem=first_line(error))
