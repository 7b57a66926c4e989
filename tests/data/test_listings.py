"""The list of a large folder is kept, says what a new one says, and is made anew when the folder changes."""

import hashlib
import json
import os

import numpy as np
import pytest

from diffusion_jax.data import folders, listings, sources
from diffusion_jax.data.folders import DECODER
from tests.data import odd


@pytest.fixture(params=["captions", "several", "classes", "alone"])
def folder(request, tmp_path):
    root = tmp_path / "pictures"
    for number in range(12):
        name = f"{'a, b' if number % 3 else 'c'}/{number}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(odd.solid(number))
        if request.param == "captions":
            (root / name).with_suffix(".txt").write_text("" if number == 5 else f"número {number}")
    if request.param == "several":
        lines = [{"file_name": f"c/{n}.png", "text": ["one", "two"][: 1 + n % 2]} for n in (0, 3, 6)]
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    if request.param == "alone":
        (root / os.fsdecode(b"not utf-8 \xff.png")).write_bytes(odd.solid(200))
    return root


def new_listings(monkeypatch) -> list:
    made, list_pictures = [], listings.list_pictures
    monkeypatch.setattr(listings, "list_pictures", lambda root: made.append(root) or list_pictures(root))
    monkeypatch.setattr(listings, "KEPT_FROM", 1)
    return made


def test_a_list_that_is_kept_says_what_a_new_one_says(folder, tmp_path, monkeypatch):
    made = new_listings(monkeypatch)
    new = sources.folder(folder)
    for kept in (sources.folder(folder, tmp_path), sources.folder(folder, tmp_path)):
        assert (kept.name, len(kept), kept.num_classes) == (new.name, len(new), new.num_classes)
        assert list(kept.captions) == list(new.captions) and list(kept.files) == list(new.files)
        for record, expected in zip(kept, new, strict=True):
            np.testing.assert_equal(record, expected)
    assert len(made) == 2


def test_a_changed_folder_is_listed_anew(folder, tmp_path, monkeypatch):
    made = new_listings(monkeypatch)

    def count(change) -> int:
        before = len(made)
        change()
        sources.folder(folder, tmp_path)
        return len(made) - before

    def add() -> None:
        (folder / "c" / "new.png").write_bytes(odd.solid(1))
        if (folder / "c" / "0.txt").exists():
            (folder / "c" / "new.txt").write_text("new")

    metadata, first = folder / "metadata.jsonl", folder / "c" / "0.png"
    assert count(lambda: None) == 1 and count(lambda: None) == 0
    assert count(lambda: first.write_bytes(odd.solid(1))) == 0  # in its place: not seen
    assert count(lambda: os.utime(folder)) == 1
    assert count(add) == 1 and ("new" in sources.folder(folder, tmp_path).captions) == (folder / "c" / "0.txt").exists()
    if metadata.exists():
        assert count(lambda: metadata.write_text('{"file_name": "c/0.png", "text": "new"}')) == 1
        assert list(sources.folder(folder, tmp_path).captions) == ["new"]
    elif first.with_suffix(".txt").exists():
        first.with_suffix(".txt").unlink()
        with pytest.raises(FileNotFoundError, match=r"none for 1 of its pictures: c/0\.png"):
            sources.folder(folder, tmp_path)


def test_small_folders_are_never_kept_and_without_a_place_none_is(folder, tmp_path, monkeypatch):
    sources.folder(folder, tmp_path)
    monkeypatch.setattr(listings, "KEPT_FROM", 1)
    sources.folder(folder)
    assert not list(tmp_path.glob("lists/*.arrow"))


def test_a_list_that_cannot_be_kept_is_made_at_every_start(folder, tmp_path, monkeypatch, caplog):
    new_listings(monkeypatch)
    (place := tmp_path / "file").write_text("so that there can be no folder")
    assert sources.folder(folder, place).name == sources.folder(folder).name
    assert "its list is not kept" in caplog.text


def test_the_digest_is_the_hash_of_one_text(folder, monkeypatch):
    listing = folders.list_pictures(folder)
    stats = [os.stat(folder / file) for file in listing.files]
    content = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in zip(listing.files, stats, strict=True)]
    expected = hashlib.sha256(json.dumps([DECODER, content, listing.captions]).encode()).hexdigest()
    for at_once in (5, 10_000):
        monkeypatch.setattr(folders, "AT_ONCE", at_once)
        assert folders.digest(folder, listing) == expected
