"""ArrayRecord files of tf.train.Example, as TFDS writes them: a picture in bytes, captions in bytes, a class."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from diffusion_jax.data.rows import Row, described, first_of
from diffusion_jax.messages import first_line

PICTURES = ("image", "image/encoded", "jpg", "jpeg", "png", "webp", "img", "image_bytes")
READ_AT_ONCE = 64
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def scan(shard: Path) -> Iterator[Row]:
    """The records of a shard. Raises ValueError if it is not a whole, undamaged ArrayRecord file."""
    reader = _reader(shard)
    for start in range(0, reader.num_records(), READ_AT_ONCE):
        stop = min(start + READ_AT_ONCE, reader.num_records())
        try:
            contents = reader.read(start, stop)
        except RuntimeError as error:
            raise ValueError(f"{shard}: records {start} to {stop - 1} are damaged; {first_line(error)}") from error
        for number, content in enumerate(contents, start):
            yield _row(number, content)


def opened(shard: Path) -> Callable[[int, int], bytes]:
    """A function (number of the record, unused) -> the bytes of its picture. Thread-safe."""
    reader = _reader(shard)

    def read(number: int, _: int) -> bytes:
        features = _features(reader.read([number])[0])
        return features[first_of(PICTURES, features)][0]

    return read


def _reader(shard: Path) -> ArrayRecordReader:
    reader = ArrayRecordReader(str(shard), RANDOM_ACCESS)
    if not reader.ok():
        raise ValueError(f"{shard}: expected a whole ArrayRecord file; write or copy it again")
    return reader


def _row(number: int, content: bytes) -> Row:
    name = f"record {number}"
    try:
        features = _features(content)
    except DecodeError:
        return Row(name, problem="not a tf.train.Example, the form of TFDS")
    picture = first_of(PICTURES, features)
    if picture is None or not features[picture] or not isinstance(features[picture][0], bytes):
        return Row(name, problem=f"no picture in bytes, as {PICTURES[0]}, among the features {sorted(features)}"[:300])
    try:
        return Row(name, number, **described(features, _value))
    except ValueError as error:
        return Row(name, problem=first_line(error))


def _features(content: bytes) -> dict[str, list]:
    """{feature: its values} of a serialized Example."""
    example = tf_example_pb2.Example()
    example.ParseFromString(content)
    kinds = ((name, feature, feature.WhichOneof("kind")) for name, feature in example.features.feature.items())
    return {name: list(getattr(feature, kind).value) if kind else [] for name, feature, kind in kinds}


def _value(values: list) -> Any:
    """The values of a feature: all of several, the only one of one, None of none."""
    return values if len(values) > 1 else next(iter(values), None)
