"""A hash of files that is computed once for each version of them."""

import hashlib
import os

import pytest

from diffusion_jax import paths
from diffusion_jax.interop.fingerprint import fingerprint


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    (tmp_path / "model").mkdir()
    for name in "ab":
        (tmp_path / "model" / name).write_bytes(name.encode())
    return [tmp_path / "model" / name for name in "ab"]


@pytest.fixture
def read(monkeypatch):
    """The names of the files that were hashed."""
    names, file_digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, kind: names.append(file.name) or file_digest(file, kind))
    return names


def test_files_are_read_once_until_they_change(files, read):
    first = fingerprint(files)
    assert fingerprint(files) == first and len(read) == 2
    times = files[1].stat()
    files[1].write_bytes(b"c")  # of the same size, and made to look as old
    os.utime(files[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert fingerprint(files) != first and len(read) == 4


def test_names_and_contents_count_and_folders_do_not(files):
    first = fingerprint(files)
    moved = files[0].parent.rename(files[0].parent.with_name("moved"))
    assert fingerprint([moved / "a", moved / "b"]) == first
    (moved / "a").rename(moved / "c")
    assert fingerprint([moved / "c", moved / "b"]) != first


def test_without_a_place_to_keep_it_files_are_read_again(files, read, tmp_path):
    first = fingerprint(files)
    (kept,) = (tmp_path / "cache" / "fingerprints").iterdir()
    kept.write_text("torn")
    assert fingerprint(files) == first and len(read) == 4
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file instead")
    assert fingerprint(files) == fingerprint(files) == first and len(read) == 8
