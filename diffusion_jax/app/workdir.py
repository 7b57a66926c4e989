"""The work directory of a run: checked to be writable before the work begins, and locked by one training at a time."""

import contextlib
import fcntl
from collections.abc import Iterator

from diffusion_jax import parallel, paths
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path


def make_writable(folder: Path) -> None:
    """Create the folder. Raises OSError, naming it, if files cannot be written in it."""
    try:
        paths.try_writing(folder)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise OSError(f"cannot write to {folder} ({reason}): name another --workdir") from error


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Lock the work directory within this context. The system releases the lock if the process dies.

    Of several hosts the first locks it for all. A bucket has no locks: there, trainings on this machine lock each other
    out. Raises OSError if it is not writable or another training has locked it.
    """
    make_writable(workdir)
    if not parallel.is_main():
        yield
        return
    file = paths.beside(workdir, "lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OSError(f"another training runs in {workdir}: wait for its end, or name another --workdir") from error
        yield
