"""The work directory of a run: checked to be writable before the work begins, and locked by one training at a time."""

import contextlib
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path

from diffusion_jax import parallel


def make_writable(folder: Path) -> None:
    """Create the folder. Raises OSError, naming it, if files cannot be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): name another --workdir") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock the work directory within this context. The system releases the lock if the process dies.

    Of several hosts the first locks it for all. Raises OSError if it is not writable or another training has locked it.
    """
    make_writable(workdir)
    if not parallel.is_main():
        yield
        return
    with (workdir / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another training runs in {workdir}: wait for its end, or name another --workdir") from error
        yield
