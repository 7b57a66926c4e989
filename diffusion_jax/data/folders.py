"""Find the pictures of a folder, and their captions or classes."""

import collections
import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
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
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
DECODER = 3  # changes whenever `transforms.decode` gives other pixels
csv.field_size_limit(2**31 - 1)  # of a text, which Python limits to 128 KiB

Caption = str | tuple[str, ...]


class Listing(NamedTuple):
    """The pictures of a folder, as paths relative to it.

    captions, labels: one for each picture, or empty. If a picture has several captions, all captions are tuples.
    classes: the names of the classes.
    """

    files: list[Path]
    captions: list[Caption]
    labels: list[int]
    classes: list[str]


def list_pictures(root: Path) -> Listing:
    """List the pictures below a folder. Captions or labels come from the first of these that exists.

    metadata.jsonl, metadata.csv or metadata.parquet, in the folder or below, the imagefolder convention: lines
      {"file_name": "cats/1.png", "text": "a cat"}, relative to the folder of the metadata; only these pictures. A list
      of texts is several captions.
    1.txt beside every 1.png: its caption.
    cats/1.png: every picture is in a subfolder, its class.

    Follows links to folders, each folder once. Skips hidden files and folders. Logs how many other files it leaves out.
    Raises FileNotFoundError if there is no folder or no picture, or if a picture or a caption is missing.
    Raises ValueError for metadata in another form, for a picture that two files of metadata name, for text that is not
    UTF-8, and for folders that are splits, as train and test, where classes are expected.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = sorted(file.relative_to(root) for file in _files(root))
    metadata = [file for file in found if file.name in METADATA]
    listing = _described(root, metadata) if metadata else _undescribed(root, found)
    used = {*metadata, *listing.files, *(file.with_suffix(".txt") for file in listing.files)}
    left_out = collections.Counter(file.suffix.lower() or "without a suffix" for file in found if file not in used)
    if left_out:
        why = "no metadata name them" if metadata else "they are no pictures of a known form"
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
        logging.warning("%s: left out %d files, as %s: %s", root, left_out.total(), why, kinds)
    return listing


def _described(root: Path, metadata: list[Path]) -> Listing:
    """The pictures that files of metadata name."""
    captions = _metadata(root, metadata)
    return Listing([file for file, _ in captions], _alike([caption for _, caption in captions]), [], [])


def _undescribed(root: Path, found: list[Path]) -> Listing:
    """The pictures among the files of a folder, with the captions beside them, or else their classes."""
    files = [file for file in found if file.suffix.lower() in suffixes()]
    if not files:
        raise FileNotFoundError(f"{root} has no pictures ({' '.join(suffixes())})")
    captions = _sidecars(root, files)
    if captions or any(len(file.parts) == 1 for file in files):
        return Listing(files, captions, [], [])
    classes = sorted({file.parts[0] for file in files})
    if {name.lower() for name in classes} <= SPLITS:
        raise ValueError(
            f"{root} has the folders {', '.join(classes)}, which are splits and no classes: name one of them, as "
            f"{root / classes[0]}"
        )
    return Listing(files, [], [classes.index(file.parts[0]) for file in files], classes)


def digest(root: Path, listing: Listing) -> str:
    """A hash of captions and pictures. Uses file sizes and times for the pictures, because reading them takes long."""
    stats = [(root / file).stat() for file in listing.files]
    content = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(listing.files, stats, strict=True)]
    return hashlib.sha256(json.dumps([DECODER, content, listing.captions]).encode()).hexdigest()


def _files(root: Path) -> Iterator[Path]:
    """The files below a folder and below the folders that it links to, each folder once.

    Raises FileNotFoundError for a link that leads nowhere.
    """
    listed: set[Path] = set()
    folders, links = [root], []
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)  # links last: a folder keeps its own name
        if folder.resolve() in listed:
            continue
        listed.add(folder.resolve())
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_symlink() and not path.exists():
                raise FileNotFoundError(f"{path} is a link to what is not there; mend or remove it")
            if path.is_file():
                yield path
            elif path.is_dir():
                (links if path.is_symlink() else folders).append(path)


def _metadata(root: Path, files: list[Path]) -> list[tuple[Path, Caption]]:
    """(picture, caption) from files of metadata."""
    captions: list[tuple[Path, Caption]] = []
    named_by: dict[Path, Path] = {}
    for file in files:
        of_file = [(file.parent / picture, caption) for picture, caption in _lines(root / file)]
        missing = [picture for picture, _ in of_file if not (root / picture).is_file()]
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


def _sidecars(root: Path, files: list[Path]) -> list[Caption]:
    """The captions in the text files beside the pictures, or empty if there are none."""
    uncaptioned = [file for file in files if not (root / file).with_suffix(".txt").is_file()]
    if len(uncaptioned) == len(files):
        return []
    if uncaptioned:
        raise FileNotFoundError(
            f"{root} has captions, but none for {len(uncaptioned)} of its pictures: {_first_few(uncaptioned)}"
        )
    return [_text((root / file).with_suffix(".txt")).strip() for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8 ({error}); save it as such") from error


def _first_few(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
