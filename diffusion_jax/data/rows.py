"""What a record of a shard says beside its picture: names and forms that shards of all kinds share."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

# Pillow's names of picture formats; it needs a plugin for HEIF and JXL, as for AVIF in some builds
FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")

# names of fields, the plainest first; letters of any case
CAPTIONS = ("caption", "captions", "text", "texts", "txt", "prompt", "captions/text", "image/caption")
LABELS = ("label", "labels", "cls", "class", "image/class/label")


class Row(NamedTuple):
    """A record of a shard.

    name: of the record within its shard, for messages.
    offset, size: where its picture is. The meaning of both belongs to the kind of shard.
    captions: all of them, empty if there are none.
    label: a whole number or the name of a class, None without one.
    problem: why the record cannot be used, "" if it can.
    """

    name: str
    offset: int = 0
    size: int = 0
    captions: Sequence[str] = ()
    label: str | None = None
    problem: str = ""


@functools.cache
def suffixes() -> list[str]:
    """The suffixes of pictures that Pillow reads, as ".png"."""
    return [suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS]


def first_of(names: tuple[str, ...], present: Iterable[str]) -> str | None:
    """The first of some names that is present, as it is written there, or None."""
    return _first_of(names, tuple(present))


@functools.lru_cache(256)  # the records of a shard have the same fields
def _first_of(names: tuple[str, ...], present: tuple[str, ...]) -> str | None:
    written = {name.lower(): name for name in present}
    return next((written[name] for name in names if name in written), None)


def captions_of(value: Any) -> tuple[str, ...]:
    """The captions in a field: a text, or a list of texts, without its nulls. Other values are no captions.

    Raises UnicodeError, a ValueError, for bytes that are not UTF-8 and for half of a surrogate pair.
    """
    values = [_text(item) for item in (value if isinstance(value, list) else [value]) if item is not None]
    return tuple(values) if all(isinstance(item, str) for item in values) else ()


def label_of(value: Any) -> str | None:
    """The class in a field: a whole number from 0, also one written as a float, or a name. Other values, the empty name
    and numbers below 0 are no class. Raises what `captions_of` raises.
    """
    value = _text(value)
    if isinstance(value, str):
        name = value.strip()
        return None if re.fullmatch(r"-\d+", name) else name or None
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if is_whole and value >= 0 else None


def _text(value: Any) -> Any:
    """Bytes as text; other values as they are. Raises UnicodeError for text that cannot be written in UTF-8."""
    if isinstance(value, str):
        value.encode()
    return value.decode() if isinstance(value, bytes) else value


def described(fields: Mapping[str, Any], plain: Callable[[Any], Any] = lambda value: value) -> dict[str, Any]:
    """The captions and the label in named fields, as arguments of `Row`.

    plain: makes None, a text, bytes, a number or a list of the value of a field.
    Raises ValueError for text that cannot be written in UTF-8.
    """
    caption, label = first_of(CAPTIONS, fields), first_of(LABELS, fields)
    return {
        "captions": captions_of(plain(fields[caption])) if caption else (),
        "label": label_of(plain(fields[label])) if label else None,
    }
