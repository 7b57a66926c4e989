"""Paths of files: on a local disk, or in a bucket of Google Cloud Storage, gs://BUCKET/PATH.

Only this file knows buckets. A path in a bucket has the methods of pathlib.Path, but an object cannot be appended to,
locked or mapped into memory, and appears whole when its upload ends. Requests that fail are repeated for four minutes.
"""

import asyncio
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import pathlib
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from logging import CRITICAL, getLogger
from typing import Any

from absl import logging

from diffusion_jax import messages
from diffusion_jax.messages import first_line

os.environ.setdefault("EPATH_USE_TF", "false")  # else epath uses TensorFlow for buckets wherever it is installed
from etils import epath

Path = pathlib.Path | epath.Path
SCHEME = "gs://"
OTHER_SCHEME = re.compile(r"[A-Za-z][\w+.-]+://|gs:/")
CACHE = pathlib.Path.home() / ".cache" / "diffusion_jax"
COPYING = "copying-"  # the name of an unfinished copy begins so
ROLES = "give the machine's service account the roles Storage Object Admin and Storage Legacy Bucket Reader"
VERSION = ("size", "mtime", "generation")  # facts that change with an object
PAST_THE_END = 416  # status of a request for bytes after the last one
PATIENCE = 240  # seconds that a request which fails is repeated: hosts that write together wait 300 for one another
LONGEST_WAIT = 32  # seconds between two attempts
QUIET_ATTEMPTS = 2  # that fail before the log says so: single requests fail every day


class NoAnswer(OSError):
    """A bucket has not answered for PATIENCE seconds."""


def is_outage(error: BaseException | None) -> bool:
    """Whether an error comes from a bucket that does not answer."""
    return error is not None and (isinstance(error, NoAnswer) or is_outage(error.__cause__ or error.__context__))


def at(path: str | os.PathLike) -> Path:
    """The path as an object: a pathlib.Path, or in a bucket an epath.Path with the same methods.

    Raises ValueError for another kind of address, ModuleNotFoundError without gcsfs, and OSError for a bucket that does
    not exist or cannot be read.
    """
    text = os.fspath(path)
    if not text.startswith(SCHEME):
        if OTHER_SCHEME.match(text):
            raise ValueError(f"expected a local path or {SCHEME}BUCKET/PATH, got {text}")
        return pathlib.Path(os.path.expanduser(text))  # shells leave the ~ of --workdir=~/runs as it is
    bucket = text.removeprefix(SCHEME).partition("/")[0]
    if not bucket:
        raise ValueError(f"expected {SCHEME}BUCKET/PATH, got {text}")
    _check_bucket(bucket)
    return epath.Path(text.rstrip("/"))


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def local(path: str | os.PathLike, name: str) -> pathlib.Path:
    """The path of something that must be on a local disk. Raises ValueError for one in a bucket.

    name: of the flag or field, for the error.
    """
    if in_bucket(path):
        raise ValueError(f"{name}: expected a local path, got {os.fspath(path)}; copy it to a local disk first")
    return at(path)


def absolute(path: str | os.PathLike) -> Path:
    """The path, independent of the current folder."""
    path = at(path)
    return path if in_bucket(path) else path.absolute()


def beside(folder: str | os.PathLike, name: str) -> pathlib.Path:
    """A local place for files that belong to a folder, such as a lock or files to map into memory.

    It is folder/name, or for a folder in a bucket a place under ~/.cache/diffusion_jax that depends on its path.
    """
    folder = at(folder)
    return CACHE / "buckets" / str(folder).removeprefix(SCHEME) / name if in_bucket(folder) else folder / name


def matching(pattern: str) -> list[tuple[Path, int, str]]:
    """The files that match a glob pattern, sorted: (path, size in bytes, version, which changes with the file).
    Raises FileNotFoundError for a link that leads nowhere.
    """
    if in_bucket(at(pattern)):
        found = _filesystem().glob(pattern, detail=True).items()
        objects = {name: facts for name, facts in found if facts["type"] == "file" and not name.endswith("/")}
        versions = {name: " ".join(str(facts.get(key)) for key in VERSION) for name, facts in objects.items()}
        return [(at(SCHEME + name), objects[name]["size"], versions[name]) for name in sorted(objects)]
    names = glob.iglob(os.path.expanduser(pattern), recursive=True)
    found = sorted({pathlib.Path(name) for name in names})  # **/** finds some twice
    if broken := [path for path in found if not path.exists()]:
        raise FileNotFoundError(f"{broken[0]} is a link to what is not there; mend or remove it")
    stats = [(path, path.stat()) for path in found if path.is_file()]
    return [(path, stat.st_size, str(stat.st_mtime_ns)) for path, stat in stats]


def download(path: str | os.PathLike, file: pathlib.Path) -> None:
    """Copy a file of a bucket to a local one."""
    _filesystem().get_file(str(path), str(file))


def free_space(folder: str | os.PathLike) -> float:
    """Bytes that can still be written in a folder. Infinite in a bucket."""
    return math.inf if in_bucket(folder) else shutil.disk_usage(folder).free


def try_writing(folder: str | os.PathLike) -> None:
    """Create the folder. Raises OSError if files cannot be written in it."""
    folder = at(folder)
    if in_bucket(folder):
        trial = folder / f"writable-{secrets.token_hex(4)}"
        trial.write_bytes(b"")
        trial.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """The path of a local file to write, which becomes the file at `path` when the context ends without an error.

    The file at `path` is always whole: the old one, or the new one.
    """
    path = at(path)
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / path.name
            yield file
            _put(file, path)
        return
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        if error.filename == str(unfinished):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def write(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a whole file, text in UTF-8. The file at `path` is always whole: the old one, or the new one."""
    with written(path) as file:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def copy_into(folder: str | os.PathLike, source: str | pathlib.Path) -> None:
    """Copy the files of a local folder, and of those below it, into another folder."""
    folder = at(folder)
    if not in_bucket(folder):
        shutil.copytree(source, folder, dirs_exist_ok=True)
        return
    for file in _files(source):
        _put(file, folder / file.relative_to(source).as_posix())


def replace_folder(folder: str | os.PathLike, source: str | pathlib.Path) -> None:
    """Replace the files of a folder by those of a local one. The old files are deleted once all new ones are there."""
    folder = at(folder)
    if in_bucket(folder):
        copy_into(folder, source)
        kept = {str(folder / file.relative_to(source).as_posix()) for file in _files(source)}
        for name in _filesystem().find(str(folder)):
            if SCHEME + name not in kept:
                _filesystem().rm_file(name)
        return
    new = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        shutil.copytree(source, new)
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def fetched(path: str | os.PathLike, levels: int = 1) -> pathlib.Path:
    """The local path of a file or folder to read.

    From a bucket it is copied to ~/.cache/diffusion_jax/copies, and copied again only if it has changed there. The new
    copy replaces the old one.

    levels: how deep the files of a folder are copied. 1 means those that are directly in it.
    Raises FileNotFoundError if there is nothing at the path of a bucket, and OSError without space for the copy.
    """
    path = at(path)
    if not in_bucket(path):
        return path
    root, objects = str(path).removeprefix(SCHEME), _filesystem().find(str(path), maxdepth=levels, detail=True)
    objects = {name: facts for name, facts in objects.items() if not name.endswith("/")}
    if not objects:
        raise FileNotFoundError(f"{path}: no such file or folder")
    version = [[name, *(str(objects[name].get(key)) for key in VERSION)] for name in sorted(objects)]
    copy = CACHE / "copies" / _digest([str(path), levels]) / _digest(version) / path.name
    if not copy.exists():
        size = sum(facts["size"] for facts in objects.values())
        logging.info("copying %s, %s, to %s", path, messages.size(size), copy)
        _copy({name: name[len(root) :].lstrip("/") for name in objects}, size, copy)
    return copy


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _copy(places: dict[str, str], size: int, copy: pathlib.Path) -> None:
    """Copy objects of a bucket. The copy appears when it is whole, and earlier ones beside it go.

    places: object -> its place in the copy, "" for a copy that is a single file.
    """
    copy.parent.parent.mkdir(parents=True, exist_ok=True)
    if (free := free_space(copy.parent.parent)) < size:
        raise OSError(f"no space left for {copy}: {messages.size(size)} needed and {messages.size(free)} free")
    earlier = [folder for folder in copy.parent.parent.iterdir() if not folder.name.startswith(COPYING)]
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=COPYING, dir=copy.parent.parent))
    try:
        for name, place in places.items():
            target = unfinished / copy.name / place
            target.parent.mkdir(parents=True, exist_ok=True)
            _filesystem().get_file(name, str(target))
        unfinished.rename(copy.parent)
        for folder in earlier:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        if not copy.exists():  # else another process was first
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class Spool:
    """A local folder for files that grow, because objects of a bucket cannot be appended to.

    folder: where to write: the folder itself, or a temporary one for a folder in a bucket.
    """

    def __init__(self, folder: str | os.PathLike):
        self._target = at(folder)
        self.is_apart = in_bucket(self._target)
        self.folder = pathlib.Path(tempfile.mkdtemp()) if self.is_apart else self._target
        self._published: dict[pathlib.Path, tuple[int, int]] = {}

    def publish(self) -> None:
        """Copy the files that have changed to the bucket."""
        for file in _files(self.folder) if self.is_apart else ():
            version = (file.stat().st_size, file.stat().st_mtime_ns)
            if self._published.get(file) != version:
                _put(file, self._target / file.relative_to(self.folder).as_posix())
                self._published[file] = version

    def close(self) -> None:
        """Remove the temporary folder."""
        if self.is_apart:
            shutil.rmtree(self.folder)


def _put(file: pathlib.Path, target: Path) -> None:
    """Upload a local file."""
    _filesystem().put_file(str(file), str(target))


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Raise OSError, once and early, for a bucket that does not exist or cannot be read."""
    filesystem = _filesystem()
    try:
        filesystem.call("GET", "b/{}/o", bucket, maxResults=1, json_out=True)
    except FileNotFoundError as error:
        raise OSError(f"there is no bucket {SCHEME}{bucket}") from error
    except Exception as error:  # several libraries take part in a request
        raise OSError(
            f"cannot read {SCHEME}{bucket} ({first_line(error)}): sign in by `gcloud auth application-default login`, "
            f"or {ROLES}"
        ) from error


@functools.cache
def _filesystem() -> Any:
    """The buckets, as epath and Orbax see them too. Raises ModuleNotFoundError without gcsfs."""
    try:
        import fsspec
        from gcsfs.core import GCSFileSystem
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"paths in a bucket, {SCHEME}BUCKET/PATH, need gcsfs: run pip install gcsfs"
        ) from error

    class Patient(GCSFileSystem):
        """Repeats requests that fail. Keeps no listings, because others write to the bucket too. Makes no folders,
        because objects need none, and no buckets.
        """

        _request = _patiently(GCSFileSystem._request)
        _get_file_request = _patiently(GCSFileSystem._get_file_request)

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{"project": "", **kwargs, "use_listings_cache": False})

        def mkdir(self, *args, **kwargs):
            pass

        def makedirs(self, *args, **kwargs):
            pass

    getLogger("gcsfs").setLevel(CRITICAL)  # it logs the traceback of each attempt
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, Patient, clobber=True)
    return fsspec.filesystem("gcs")


def _patiently(method: Callable[..., Awaitable]) -> Callable[..., Awaitable]:
    """A request of gcsfs that is repeated for PATIENCE seconds, with growing waits, while its errors may pass.

    gcsfs itself gives up after half a minute.
    """
    from gcsfs.retry import is_retriable
    from google.auth.exceptions import GoogleAuthError

    def may_pass(error: Exception) -> bool:
        if isinstance(error, GoogleAuthError):
            return error.retryable
        return is_retriable(error) or isinstance(error, asyncio.TimeoutError)

    attempt = getattr(method, "__wrapped__", method)  # without the retries of gcsfs

    @functools.wraps(method)
    async def request(self, *args, **kwargs):
        start, failed = time.monotonic(), 0
        while True:
            try:
                result = await attempt(self, *args, **kwargs)
            except Exception as error:
                failed, passed = failed + 1, time.monotonic() - start
                if not may_pass(error):
                    if isinstance(error, OSError | ValueError) or getattr(error, "code", None) == PAST_THE_END:
                        raise  # gcsfs knows these
                    raise OSError(f"the bucket refuses a request: {first_line(error)}") from error
                if passed > PATIENCE:
                    raise NoAnswer(f"the bucket has not answered for {passed:.0f} s: {first_line(error)}") from error
                if failed == QUIET_ATTEMPTS + 1:
                    _outage(first_line(error))
                await asyncio.sleep(min(2 ** (failed - 1), LONGEST_WAIT) * random.uniform(0.5, 1))
            else:
                if failed > QUIET_ATTEMPTS:
                    _outage("")
                return result

    return request


_reason = ""


def _outage(reason: str) -> None:
    """Log that the bucket fails for a reason, or with "" that it answers again. Once, not for every request."""
    global _reason
    if bool(reason) != bool(_reason):
        waiting = f"the bucket does not answer ({reason}): trying again for up to {PATIENCE // 60} minutes"
        logging.warning("%s", waiting if reason else "the bucket answers again")
    _reason = reason
