"""Find the pictures of a folder, and their captions or classes."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Listing(NamedTuple):
    """The pictures of a folder, as paths relative to it.

    captions, labels: one for each picture, or empty.
    classes: the names of the classes.
    """

    files: list[Path]
    captions: list[str]
    labels: list[int]
    classes: list[str]


def list_pictures(root: Path) -> Listing:
    """List the pictures below a folder. Captions or labels come from the first of these that exists.

    metadata.jsonl: lines {"file_name": "cats/1.png", "text": "a cat"}, the imagefolder convention; only these pictures.
    1.txt beside every 1.png: its caption.
    cats/1.png: every picture is in a subfolder, its class.

    Raises FileNotFoundError if there is no folder or no picture, or if a picture or a caption is missing.
    Raises ValueError for a line of metadata.jsonl in another form, and for text that is not UTF-8.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    captions = _metadata(root)
    if captions is None:
        files = _find(root)
        captions = _sidecars(root, files)
    if captions:
        return Listing([file for file, _ in captions], [caption for _, caption in captions], [], [])
    if any(len(file.parts) == 1 for file in files):
        return Listing(files, [], [], [])
    classes = sorted({file.parts[0] for file in files})
    return Listing(files, [], [classes.index(file.parts[0]) for file in files], classes)


def digest(root: Path, listing: Listing) -> str:
    """A hash of captions and pictures. Uses file sizes and times for the pictures, because reading them takes long."""
    stats = [(root / file).stat() for file in listing.files]
    content = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(listing.files, stats, strict=True)]
    return hashlib.sha256(json.dumps([content, listing.captions]).encode()).hexdigest()


def _find(root: Path) -> list[Path]:
    """The pictures below root, sorted by name. Skips hidden files and folders."""
    files = (file.relative_to(root) for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    files = sorted(file for file in files if not any(part.startswith(".") for part in file.parts))
    if not files:
        raise FileNotFoundError(f"{root} has no pictures ({' '.join(SUFFIXES)})")
    return files


def _metadata(root: Path) -> list[tuple[Path, str]] | None:
    """(picture, caption) from metadata.jsonl, or None without that file."""
    metadata = root / "metadata.jsonl"
    if not metadata.exists():
        return None
    captions = []
    for number, line in enumerate(_text(metadata).splitlines(), start=1):
        try:
            entry = json.loads(line)
            captions.append((Path(entry["file_name"]), str(entry["text"])))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            form = '{"file_name": "...", "text": "..."}'
            raise ValueError(f"{metadata} line {number}: expected {form}, got {line[:80]}") from error
    if not captions:
        raise ValueError(f"{metadata} is empty: write its lines or remove it")
    missing = [file for file, _ in captions if not (root / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{metadata} names pictures that are missing ({len(missing)}): {_first_few(missing)}")
    return captions


def _sidecars(root: Path, files: list[Path]) -> list[tuple[Path, str]]:
    """(picture, caption) from the text files beside the pictures, or empty if there are none."""
    uncaptioned = [file for file in files if not (root / file).with_suffix(".txt").exists()]
    if len(uncaptioned) == len(files):
        return []
    if uncaptioned:
        raise FileNotFoundError(
            f"{root} has captions, but none for {len(uncaptioned)} of its pictures: {_first_few(uncaptioned)}"
        )
    return [(file, _text((root / file).with_suffix(".txt")).strip()) for file in files]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8 ({error}); save it as such") from error


def _first_few(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (", ..." if len(files) > 3 else "")
