"""Find the pictures of a folder, and their captions or classes."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = {  # files of captions, and their form in errors
    "metadata.jsonl": '{"file_name": "...", "text": "..."}',
    "metadata.csv": "the columns file_name and text",
}
DECODER = 2  # changes whenever `transforms.decode` gives other pixels

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

    metadata.jsonl or metadata.csv, in the folder or below, the imagefolder convention: lines {"file_name":
      "cats/1.png", "text": "a cat"}, relative to the folder of the metadata; only these pictures. A list of texts is
      several captions.
    1.txt beside every 1.png: its caption.
    cats/1.png: every picture is in a subfolder, its class.

    Follows links to folders, each folder once. Skips hidden files and folders.
    Raises FileNotFoundError if there is no folder or no picture, or if a picture or a caption is missing.
    Raises ValueError for metadata in another form, for a picture that two files of metadata name, and for text that is
    not UTF-8.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    found = sorted(file.relative_to(root) for file in _files(root))
    captions = _metadata(root, [file for file in found if file.name in METADATA])
    if not captions:
        files = [file for file in found if file.suffix.lower() in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{root} has no pictures ({' '.join(SUFFIXES)})")
        captions = _sidecars(root, files)
    if captions:
        return Listing([file for file, _ in captions], _alike([caption for _, caption in captions]), [], [])
    if any(len(file.parts) == 1 for file in files):
        return Listing(files, [], [], [])
    classes = sorted({file.parts[0] for file in files})
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
    text, captions = _text(metadata), []
    if metadata.suffix == ".csv":
        try:
            lines = list(csv.DictReader(io.StringIO(text), strict=True))
        except csv.Error as error:
            raise ValueError(f"{metadata}: expected CSV, got an error: {error}") from error
    else:  # str.splitlines would also split inside of texts, at U+2028 for example
        lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if isinstance(line, str) and not line.strip():
            continue
        try:
            captions.append(_entry(json.loads(line) if isinstance(line, str) else line))
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            what = "line" if isinstance(line, str) else "row"
            form = METADATA[metadata.name]
            raise ValueError(f"{metadata} {what} {number}: expected {form}, got {str(line)[:80]}") from error
    if not captions:
        raise ValueError(f"{metadata} is empty: write its lines or remove it")
    return captions


def _entry(entry: Any) -> tuple[Path, Caption]:
    """(picture, caption) from one line. Raises KeyError or TypeError for one in another form."""
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    is_list = isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)
    if not is_list or None in entry:  # csv keeps what is beyond the last column under None
        raise TypeError
    return Path(entry["file_name"]), texts[0] if len(texts) == 1 else tuple(texts)


def _alike(captions: list[Caption]) -> list[Caption]:
    """The captions, all of them tuples if some are."""
    if not any(isinstance(caption, tuple) for caption in captions):
        return captions
    return [caption if isinstance(caption, tuple) else (caption,) for caption in captions]


def _sidecars(root: Path, files: list[Path]) -> list[tuple[Path, Caption]]:
    """(picture, caption) from the text files beside the pictures, or empty if there are none."""
    uncaptioned = [file for file in files if not (root / file).with_suffix(".txt").is_file()]
    if len(uncaptioned) == len(files):
        return []
    if uncaptioned:
        raise FileNotFoundError(
            f"{root} has captions, but none for {len(uncaptioned)} of its pictures: {_first_few(uncaptioned)}"
        )
    return [(file, _text((root / file).with_suffix(".txt")).strip()) for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8 ({error}); save it as such") from error


def _first_few(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
