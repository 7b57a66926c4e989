"""The work directory of a run: checked to be writable and shared by all hosts before the work begins, and locked by one
training at a time.
"""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator

from diffusion_jax import hosts, parallel, paths
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path

SHARING = 10  # seconds after which all hosts see a file that one of them has written


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
    out. Raises OSError, on every host, if it is not writable, if another training has locked it, or if the hosts do not
    share it.
    """
    with contextlib.ExitStack() as stack:
        hosts.raise_together(_error_of(lambda: _lock(workdir, stack)))
        if hosts.several():
            _check_shared(workdir)
        yield


def wait_for(path: Path, content: str | None = None) -> None:
    """Wait until this host sees a file that host 0 has written: a shared file system may take seconds.

    content: what the file must hold. Raises OSError if it does not appear.
    """
    if not in_time(lambda: _holds(path, content)):
        raise OSError(
            f"{path.parent} is not the folder of host 0: all hosts must share the work directory, "
            "on a network disk for example; name such a --workdir"
        )


def in_time(condition: Callable[[], bool]) -> bool:
    """Whether the condition is met before a shared file system has had its time to show a file. Waits until then."""
    end = time.monotonic() + SHARING
    while not (is_met := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return is_met


def _holds(path: Path, content: str | None) -> bool:
    try:
        next(path.parent.iterdir(), None)  # makes a network file system look again
        return path.exists() if content is None else path.read_text() == content
    except OSError:
        return False


def _lock(workdir: Path, stack: contextlib.ExitStack) -> None:
    make_writable(workdir)
    if not parallel.is_main():
        return
    file = paths.beside(workdir, "lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context(file.open("w"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(f"another training runs in {workdir}: wait for its end, or name another --workdir") from error


def _check_shared(workdir: Path) -> None:
    """Host 0 writes a run file, with a name of this run, that every host must see."""
    run, file = hosts.token(), workdir / "run"
    if parallel.is_main():
        paths.write(file, run)
    hosts.raise_together(_error_of(lambda: wait_for(file, run)))


def _error_of(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None
