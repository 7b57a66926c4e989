"""A file system of its own for a folder, which a test can fill."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def of_size(folder: Path, size: str) -> Iterator[Callable[[str], None]]:
    """Make the folder, on a file system of this size, such as 1m. Yields a function that resizes it. Skips the test
    where mounting is not permitted.
    """
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)

    done = mount("-o", f"size={size}")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield lambda size: mount("-o", f"remount,size={size}").check_returncode()
    subprocess.run(["umount", "-l", str(folder)], check=True)
