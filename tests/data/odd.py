"""Pictures, captions and classes of every odd form, in files as other programs write them."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

COUNT, SHARDS = 200, 5
CAPTIONS = (
    "a red fish",
    "",
    "ein grüner Fuchs, schlafend",
    "赤い魚",
    "قطة سوداء",
    "🐟🏳️‍🌈",
    'a "quoted"\ttab',
    "two\nlines",
)
CLASSES = ("fish, red", "Zebra", "äpfel", "10 things")
BROKEN = "broken"


class Odd(NamedTuple):
    """A record: its picture as a file with this suffix, its caption and its class."""

    number: int
    picture: bytes
    suffix: str
    caption: str
    label: str


def record(number: int) -> Odd:
    return Odd(number, *_picture(number), CAPTIONS[number % len(CAPTIONS)], CLASSES[number // 3 % len(CLASSES)])


def records() -> list[Odd]:
    return [record(number) for number in range(COUNT)]


def in_shards() -> Iterator[tuple[int, list[Odd]]]:
    """(number of a shard, its records)."""
    return enumerate(records()[start : start + COUNT // SHARDS] for start in range(0, COUNT, COUNT // SHARDS))


def _picture(number: int) -> tuple[bytes, str]:
    kinds = ("RGB", "L", "CMYK", "I;16", "LA", "P", "exif", BROKEN)
    kind, rng = kinds[number % 7 if number % 31 else 7], np.random.default_rng(number)
    levels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image, options = Image.fromarray(levels), {}
    if kind == "exif":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    elif kind == "I;16":
        image = Image.fromarray(rng.integers(0, 2**16, (9, 12), dtype=np.uint16))
    elif kind != BROKEN:
        image = image.convert(kind)
    form, suffix = ("JPEG", "jpg") if kind in ("CMYK", "exif") else ("PNG", "png")
    file = io.BytesIO()
    image.save(file, form, **options)
    content = file.getvalue()
    return content[: len(content) // 2] if kind == BROKEN else content, suffix


def captioned_folder(folder: Path) -> Path:
    folder.mkdir()
    for each in records():
        (folder / f"{each.number:03}.{each.suffix}").write_bytes(each.picture)
        (folder / f"{each.number:03}.txt").write_text(each.caption)
    return folder


def classes_folder(folder: Path) -> Path:
    for each in records():
        (folder / each.label).mkdir(parents=True, exist_ok=True)
        (folder / each.label / f"{each.number:03}.{each.suffix}").write_bytes(each.picture)
    return folder


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(folder: Path) -> str:
    """As `webdataset.TarWriter` writes them."""
    folder.mkdir()
    for shard, found in in_shards():
        members = []
        for number, picture, suffix, caption, label in found:
            beside = {"cls": label.encode(), suffix: picture, "txt": caption.encode(), "json": b'{"url": "x"}'}
            members += [(f"{number:09}.{ending}", content) for ending, content in beside.items()]
        write_tar(folder / f"{shard:05}.tar", members)
    return f"{folder}/*.tar"


def parquets(folder: Path) -> str:
    """As `datasets` writes them, with an Image feature; every other picture is a path beside the shard."""
    folder.mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {
        "image": {"_type": "Image"},
        **{name: {"dtype": "string", "_type": "Value"} for name in ("text", "label")},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema([("image", kind), ("text", pa.string()), ("label", pa.string())], metadata)
    for shard, found in in_shards():
        rows = []
        for number, picture, suffix, caption, label in found:
            place = f"{number:03}.{suffix}"
            if number % 2:
                (folder / place).write_bytes(picture)
            image = {"bytes": None if number % 2 else picture, "path": place}
            rows.append({"image": image, "text": caption, "label": label})
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, folder / f"train-{shard:05}-of-{SHARDS:05}.parquet", row_group_size=7)
    return f"{folder}/train-*.parquet"


def img2datasets(folder: Path) -> str:
    """As img2dataset writes Parquet. It has no classes."""
    folder.mkdir()
    for shard, found in in_shards():
        columns = {
            "key": [f"{each.number:09}" for each in found],
            "status": ["success"] * len(found),
            "error_message": pa.nulls(len(found), pa.string()),
            "caption": [each.caption for each in found],
            "width": [12] * len(found),
            "jpg": pa.array([each.picture for each in found], pa.binary()),
        }
        pq.write_table(pa.table(columns), folder / f"{shard:05}.parquet", row_group_size=100)
    return f"{folder}/*.parquet"


def example(**features: bytes | int | list) -> bytes:
    """A serialized tf.train.Example."""
    result = tf_example_pb2.Example()
    for name, value in features.items():
        values = value if isinstance(value, list) else [value]
        kind = "bytes_list" if isinstance(values[0], bytes) else "int64_list"
        getattr(result.features.feature[name], kind).value.extend(values)
    return result.SerializeToString()


def write_array_record(file: Path, contents: list[bytes]) -> None:
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


def array_records(folder: Path) -> str:
    """As TFDS and others write them: tf.train.Example."""
    folder.mkdir()
    for shard, found in in_shards():
        contents = [
            example(image=each.picture, caption=each.caption.encode(), label=each.label.encode()) for each in found
        ]
        write_array_record(folder / f"{shard:05}.array_record", contents)
    return f"{folder}/*.array_record"


def solid(level: int) -> bytes:
    """A PNG whose pixels all have this level."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()
