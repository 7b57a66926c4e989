"""Pictures, captions and classes of every odd form, in files as other programs write them."""

import io
import json
import tarfile
from pathlib import Path

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


def record(number: int) -> tuple[bytes, str, str, str]:
    """(picture, its suffix, caption, class)."""
    picture, suffix = _picture(number)
    return picture, suffix, CAPTIONS[number % len(CAPTIONS)], CLASSES[number // 3 % len(CLASSES)]


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
    for number in range(COUNT):
        picture, suffix, caption, _ = record(number)
        (folder / f"{number:03}.{suffix}").write_bytes(picture)
        (folder / f"{number:03}.txt").write_text(caption)
    return folder


def classes_folder(folder: Path) -> Path:
    for number in range(COUNT):
        picture, suffix, _, name = record(number)
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number:03}.{suffix}").write_bytes(picture)
    return folder


def in_shards(records: int = COUNT) -> list[range]:
    return [range(start, start + records // SHARDS) for start in range(0, records, records // SHARDS)]


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def tars(folder: Path) -> str:
    """As `webdataset.TarWriter` writes them."""
    folder.mkdir()
    for shard, numbers in enumerate(in_shards()):
        members = []
        for number in numbers:
            picture, suffix, caption, name = record(number)
            beside = {"cls": name.encode(), suffix: picture, "txt": caption.encode(), "json": b'{"url": "x"}'}
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
    for shard, numbers in enumerate(in_shards()):
        rows = []
        for number in numbers:
            picture, suffix, caption, name = record(number)
            place = f"{number:03}.{suffix}"
            if number % 2:
                (folder / place).write_bytes(picture)
            image = {"bytes": None if number % 2 else picture, "path": place}
            rows.append({"image": image, "text": caption, "label": name})
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, folder / f"train-{shard:05}-of-{SHARDS:05}.parquet", row_group_size=7)
    return f"{folder}/train-*.parquet"


def img2datasets(folder: Path) -> str:
    """As img2dataset writes Parquet. It has no classes."""
    folder.mkdir()
    for shard, numbers in enumerate(in_shards()):
        pictures = [record(number) for number in numbers]
        columns = {
            "key": [f"{number:09}" for number in numbers],
            "status": ["success"] * len(pictures),
            "error_message": pa.nulls(len(pictures), pa.string()),
            "caption": [caption for _, _, caption, _ in pictures],
            "width": [12] * len(pictures),
            "jpg": pa.array([picture for picture, *_ in pictures], pa.binary()),
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
    for shard, numbers in enumerate(in_shards()):
        contents = []
        for number in numbers:
            picture, _, caption, name = record(number)
            contents.append(example(image=picture, caption=caption.encode(), label=name.encode()))
        write_array_record(folder / f"{shard:05}.array_record", contents)
    return f"{folder}/*.array_record"


def solid(level: int) -> bytes:
    """A PNG whose pixels all have this level."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(file, "PNG")
    return file.getvalue()
