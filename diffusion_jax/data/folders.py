"""Find the pictures of a folder, and their captions or classes."""

import collections
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import Any, NamedTuple

from absl import logging

from diffusion_jax.data.rows import suffixes
from diffusion_jax.messages import first_line

COLUMNS = ("file_name", "text")
METADATA = {  # files of captions, and their form in errors
    "metadata.jsonl": '{"file_name": "...", "text": "..."}',
    "metadata.csv": "the columns file_name and text",
    "metadata.parquet": "the columns file_name and text",
}
SIDECARS = (".caption", ".txt")  # with the caption of the picture beside them; if both are there, the last
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
AT_ONCE = 10_000  # files whose names and captions are text for a hash
DECODER = 4  # changes whenever `transforms.decode` gives other pixels
csv.field_size_limit(2**31 - 1)  # of a text, which Python limits to 128 KiB

Caption = str | tuple[str, ...]


class Listing(NamedTuple):
    """The pictures of a folder, as paths relative to it, with / between their parts.

    captions, labels: one for each picture, or empty. If a picture has several captions, all captions are tuples.
    classes: the names of the classes.
    read: the folders and the files of metadata that the listing was made of, with their times and sizes.
    """

    files: Sequence[str]
    captions: Sequence[Caption]
    labels: Sequence[int]
    classes: list[str]
    read: dict[str, list[int]]


def list_pictures(root: Path) -> Listing:
    """List the pictures below a folder. Captions or labels come from the first of these that exists.

    metadata.jsonl, metadata.csv or metadata.parquet, in the folder or below, the imagefolder convention: lines
      {"file_name": "cats/1.png", "text": "a cat"}, relative to the folder of the metadata; only these pictures. A list
      of texts is several captions.
    1.txt or 1.caption beside every 1.png: its caption.
    cats/1.png: every picture is in a subfolder, its class.

    Follows links to folders, each folder once. Skips hidden files and folders. Logs how many other files it leaves out.
    Raises FileNotFoundError if there is no folder or no picture, or if a picture or a caption is missing.
    Raises ValueError for metadata in another form, for a picture that two files of metadata name, for text that is not
    UTF-8, and for folders that are splits, as train and test, where classes are expected.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    read: dict[str, list[int]] = {}
    found = sorted(_files(root, read), key=lambda file: file.split("/"))
    metadata = [file for file in found if os.path.basename(file) in METADATA]
    read |= {file: version(root, file) for file in metadata}
    listing = (_described if metadata else _undescribed)(root, found, metadata)._replace(read=read)
    names = {_stem(file) for file in listing.files}
    used = {*metadata, *listing.files, *(file for file in found if _suffix(file) in SIDECARS and _stem(file) in names)}
    left_out = collections.Counter(_suffix(file) or "without a suffix" for file in found if file not in used)
    if left_out:
        why = "no metadata name them" if metadata else "they are no pictures of a known form"
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
        logging.warning("%s: left out %d files, as %s: %s", root, left_out.total(), why, kinds)
    return listing


def version(root: Path, file: str) -> list[int]:
    """The time of the last change and the size of a file, or the time of a folder, whose entries may not change."""
    stat = os.stat(os.path.join(root, file))
    return [stat.st_mtime_ns] if S_ISDIR(stat.st_mode) else [stat.st_mtime_ns, stat.st_size]


def digest(root: Path, listing: Listing) -> str:
    """A hash of captions and pictures. Uses file sizes and times for the pictures, because reading them takes long."""
    hashed = hashlib.sha256(f"[{DECODER}, [".encode())
    for start in range(0, len(listing.files), AT_ONCE):
        content = [[file, *version(root, file)[::-1]] for file in listing.files[start : start + AT_ONCE]]
        hashed.update((", " * (start > 0) + json.dumps(content)[1:-1]).encode())
    hashed.update(b"], [")
    for start in range(0, len(listing.captions), AT_ONCE):
        hashed.update((", " * (start > 0) + json.dumps(listing.captions[start : start + AT_ONCE])[1:-1]).encode())
    hashed.update(b"]]")
    return hashed.hexdigest()


def _described(root: Path, found: list[str], metadata: list[str]) -> Listing:
    """The pictures that files of metadata name."""
    captions = _metadata(root, metadata, set(found))
    return Listing([file for file, _ in captions], _alike([caption for _, caption in captions]), [], [], {})


def _undescribed(root: Path, found: list[str], _: list[str]) -> Listing:
    """The pictures among the files of a folder, with the captions beside them, or else their classes."""
    files = [file for file in found if _suffix(file) in suffixes()]
    if not files:
        raise FileNotFoundError(f"{root} has no pictures ({' '.join(suffixes())})")
    captions = _sidecars(root, files, set(found))
    if captions or any("/" not in file for file in files):
        return Listing(files, captions, [], [], {})
    names = [file.partition("/")[0] for file in files]
    classes = sorted(set(names))
    if {name.lower() for name in classes} <= SPLITS:
        raise ValueError(
            f"{root} has the folders {', '.join(classes)}, which are splits and no classes: name one of them, as "
            f"{root / classes[0]}"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return Listing(files, [], [numbers[name] for name in names], classes, {})


def _files(root: Path, read: dict[str, list[int]]) -> Iterator[str]:
    """The files below a folder and below the folders that it links to, each folder once. Adds the folders to `read`.

    Raises FileNotFoundError for a link that leads nowhere.
    """
    listed: set[str] = set()
    folders, links = [""], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder keeps its own name
        if (real := os.path.realpath(root / folder)) in listed:
            continue
        listed.add(real)
        read[folder] = version(root, folder)  # before its entries: what is added meanwhile is a change
        for entry in sorted(os.scandir(root / folder), key=lambda entry: entry.name):
            path = os.path.join(folder, entry.name)
            if entry.name.startswith("."):
                continue
            if entry.is_file():
                yield path
            elif entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif entry.is_symlink() and not os.path.exists(entry):
                raise FileNotFoundError(f"{root / path} is a link to what is not there; mend or remove it")


def _stem(file: str) -> str:
    """The path without its suffix."""
    return os.path.splitext(file)[0]


def _suffix(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _metadata(root: Path, files: list[str], found: set[str]) -> list[tuple[str, Caption]]:
    """(picture, caption) from files of metadata."""
    captions: list[tuple[str, Caption]] = []
    named_by: dict[str, str] = {}
    for file in files:
        of_file = [(str(Path(file).parent / picture), caption) for picture, caption in _lines(root / file)]
        missing = [picture for picture, _ in of_file if picture not in found and not (root / picture).is_file()]
        if missing:
            names = _first_few(missing)
            raise FileNotFoundError(f"{root / file} names pictures that are missing ({len(missing)}): {names}")
        for picture, _ in of_file:
            if named_by.setdefault(picture, file) != file:
                raise ValueError(f"{root / picture}: {named_by[picture]} and {file} name it; leave it in one of them")
        captions += of_file
    return captions


def _lines(metadata: Path) -> list[tuple[Path, Caption]]:
    """(picture, caption) from the lines of metadata, the picture relative to its folder."""
    read = {".csv": _csv_rows, ".parquet": _parquet_rows}.get(metadata.suffix)
    # str.splitlines would also split inside of texts, at U+2028 for example
    lines, captions = read(metadata) if read else _text(metadata).split("\n"), []
    for number, line in enumerate(lines, start=1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            captions.append(_entry(json.loads(line) if isinstance(line, str) else line))
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError, RecursionError) as error:
            what = "line" if isinstance(line, str) else "row"
            form = METADATA[metadata.name]
            raise ValueError(f"{metadata} {what} {number}: expected {form}, got {str(line)[:80]}") from error
    if not captions:
        raise ValueError(f"{metadata} is empty: write its lines or remove it")
    return captions


def _csv_rows(metadata: Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(_text(metadata)), strict=True))
    except csv.Error as error:
        raise ValueError(f"{metadata}: expected CSV, got an error: {error}") from error


def _parquet_rows(metadata: Path) -> list[dict]:
    """The rows with the columns that are needed: others may have whole pictures."""
    import pyarrow.parquet  # imported late: it takes a while, and few folders have such a file

    try:
        columns = [name for name in COLUMNS if name in pyarrow.parquet.read_schema(metadata).names]
        return pyarrow.parquet.read_table(metadata, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{metadata}: expected Parquet, got an error: {first_line(error)}") from error


def _entry(entry: Any) -> tuple[Path, Caption]:
    """(picture, caption) from one line. Raises KeyError, TypeError or UnicodeEncodeError for one in another form."""
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    is_list = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if not is_list or None in entry:  # csv keeps what is beyond the last column under None
        raise TypeError
    "".join([*texts, str(entry["file_name"])]).encode()  # raises for half of a surrogate pair
    return Path(entry["file_name"]), texts[0] if len(texts) == 1 else tuple(texts)


def _alike(captions: list[Caption]) -> list[Caption]:
    """The captions, all of them tuples if some are."""
    if not any(isinstance(caption, tuple) for caption in captions):
        return captions
    return [caption if isinstance(caption, tuple) else (caption,) for caption in captions]


def _sidecars(root: Path, files: list[str], found: set[str]) -> list[Caption]:
    """The captions in the text files beside the pictures, or empty if there are none."""
    texts = {_stem(file): file for suffix in SIDECARS for file in found if _suffix(file) == suffix}
    beside = [texts.get(_stem(file)) for file in files]
    uncaptioned = [file for file, text in zip(files, beside, strict=True) if text is None]
    if len(uncaptioned) == len(files):
        return []
    if uncaptioned:
        raise FileNotFoundError(
            f"{root} has captions, but none for {len(uncaptioned)} of its pictures: {_first_few(uncaptioned)}"
        )
    return [_text(root / text).strip() for text in beside]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8 ({error}); save it as such") from error


def _first_few(files: list[str]) -> str:
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "")
