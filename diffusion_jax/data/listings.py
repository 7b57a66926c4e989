"""Lists of large folders, kept on disk: listing takes long, and seeing that nothing changed does not."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from absl import logging

from diffusion_jax.data import tables
from diffusion_jax.data.folders import DECODER, Caption, Listing, digest, list_pictures, version
from diffusion_jax.data.tables import Captions

KEPT_FROM = 10_000  # pictures; fewer are listed in a second, and then every change is seen
FORM = 1  # changes whenever a listing of the same folder says something else
TABLE = pa.schema([("file", pa.binary()), ("captions", pa.list_(pa.string())), ("label", pa.int32())])


def listed(root: Path, kept: Path | None = None) -> tuple[Listing, str]:
    """The pictures of a folder and their digest.

    kept: the folder for lists of large folders; None to list every folder anew.

    A list that is kept is used until a folder in it has another time, because an entry was added, removed or renamed,
    or until a file of metadata has another time or size. What is written into a file in its place is not seen.
    Raises what `list_pictures` raises.
    """
    if kept is None:
        listing = list_pictures(root)
        return listing, digest(root, listing)
    base = kept / "lists" / hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]
    with tables.alone(base):
        if (found := tables.stored(base)) and _is_current(root, found[1]):
            logging.info("%s: using its list of %d pictures; touch the folder to list it anew", root, len(found[0]))
            return _of_table(*found)
        listing, name = listed(root)
        if len(listing.files) < KEPT_FROM:
            return listing, name
        facts = {
            "form": [FORM, DECODER],
            "read": listing.read,
            "digest": name,
            "classes": listing.classes,
            "labels": bool(listing.labels),
            "captions": bool(listing.captions),
            "several": bool(listing.captions) and isinstance(listing.captions[0], tuple),
        }
        try:
            tables.store(base, TABLE, _rows(listing), lambda: facts)
        except OSError as error:
            logging.warning("%s: its list is not kept (%s); config.data.cache may name another folder", root, error)
            return listing, name
    return _of_table(*tables.stored(base))


def _is_current(root: Path, facts: dict) -> bool:
    """Whether the folder still has what was listed."""
    try:
        return facts["form"] == [FORM, DECODER] and all(version(root, name) == at for name, at in facts["read"].items())
    except OSError:
        return False


def _rows(listing: Listing) -> Iterator[tuple]:
    """The rows of the table. Names of files are bytes, because they may be no UTF-8."""
    for index, file in enumerate(listing.files):
        captions = listing.captions[index] if listing.captions else ()
        label = listing.labels[index] if listing.labels else None
        yield os.fsencode(file), [captions] if isinstance(captions, str) else captions, label


def _of_table(table: pa.Table, facts: dict) -> tuple[Listing, str]:
    """The listing in a table, and its digest."""
    files, captions, labels = (table[name] for name in TABLE.names)

    def caption(index: int) -> Caption:
        texts = captions[index].as_py()
        return tuple(texts) if facts["several"] else texts[0]

    listing = Listing(
        files=Captions(len(table), lambda index: os.fsdecode(files[index].as_py())),
        captions=Captions(len(table), caption) if facts["captions"] else (),
        labels=Captions(len(table), lambda index: labels[index].as_py()) if facts["labels"] else (),
        classes=facts["classes"],
        read=facts["read"],
    )
    return listing, facts["digest"]
