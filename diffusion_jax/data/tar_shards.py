"""Tar files in the WebDataset convention: consecutive files of one key are a record, as 000.jpg, 000.txt, 000.json."""

import io
import itertools
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from diffusion_jax.data.rows import Row, captions_of, described, label_of, suffixes
from diffusion_jax.messages import first_line

TEXTS = ("txt", "json", "cls")  # of a record, beside its picture
MAX_TEXT = 16 << 20  # bytes
AT_ONCE = 1 << 20  # bytes


def scan(shard: Path) -> Iterator[Row]:
    """The records of a shard. Raises ValueError if it is not a whole, uncompressed tar file."""
    try:
        with tarfile.open(shard, "r:") as tar:
            for key, members in itertools.groupby(_files(tar), key=lambda member: _split(member.name)[0]):
                yield _row(tar, key, list(members))
            tar.fileobj.seek(tar.offset)
            while rest := tar.fileobj.read(AT_ONCE):  # tarfile stops before it without an error
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("damaged or cut off after its last record, or several tar files in one")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{shard}: expected a whole tar file, uncompressed; {first_line(error)}") from error


def opened(shard: Path) -> Callable[[int, int], bytes]:
    """A function (offset, size) -> the bytes of a picture. Thread-safe."""
    file = io.FileIO(shard)
    return lambda offset, size: os.pread(file.fileno(), size, offset)


def _files(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files and links of a tar. Left out are hidden ones and those of WebDataset itself, such as __key__."""
    for member in tar:
        tar.members = []  # it would keep all of them
        is_hidden = os.path.basename(member.name).startswith((".", "__"))
        if (member.isfile() or member.islnk() or member.issym()) and not is_hidden:
            yield member


def _split(name: str) -> tuple[str, str]:
    """(key, suffix): the name up to the first dot of its last part, and what follows."""
    folder, base = os.path.split(name)
    key, _, suffix = base.partition(".")
    return os.path.join(folder, key), suffix.lower()


def _row(tar: tarfile.TarFile, key: str, members: list[tarfile.TarInfo]) -> Row:
    by_suffix = {_split(member.name)[1]: member for member in members}
    key = key.encode(errors="replace").decode()
    pictures = [suffix for suffix in by_suffix if f".{suffix}" in suffixes()]
    if not pictures:
        return Row(key, problem=f"no picture among {', '.join(f'.{suffix}' for suffix in by_suffix)}")
    picture = by_suffix[pictures[0]]
    texts = {suffix: by_suffix[suffix] for suffix in TEXTS if suffix in by_suffix}
    if links := [member.name for member in (picture, *texts.values()) if not member.isfile()]:
        return Row(key, problem=f"a link, {links[0]}; write the tar with --dereference --hard-dereference")
    if picture.issparse() or any(text.size > MAX_TEXT for text in texts.values()):
        return Row(key, problem="a sparse file, or a text of more than 16 MiB")
    try:
        description = _description({suffix: _text(tar, member) for suffix, member in texts.items()})
    except (ValueError, RecursionError) as error:
        return Row(key, problem=first_line(error))
    return Row(f"{key}.{pictures[0]}", picture.offset_data, picture.size, **description)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    return tar.extractfile(member).read().decode("utf-8-sig")


def _description(texts: dict[str, str]) -> dict:
    """The captions and the label of a record. A .txt or .cls says more than the .json."""
    fields = json.loads(texts["json"]) if "json" in texts else {}
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object in .json, got {texts['json'][:80]}")
    description = described(fields)
    if "txt" in texts:
        description["captions"] = captions_of(texts["txt"].strip())
    if "cls" in texts:
        description["label"] = label_of(texts["cls"])
    return description
