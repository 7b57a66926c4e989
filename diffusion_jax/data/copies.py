"""Local copies of shards, of bounded size in all: those that were needed last stay."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from diffusion_jax import messages, paths

THREADS = 4  # copies made at a time
UNFINISHED = ".partial"
ABANDONED = 3600  # seconds after the last change of an unfinished copy
_making_room = threading.Lock()
_promised = 0  # bytes of the copies that are being made
_all: weakref.WeakSet["Copies"] = weakref.WeakSet()


class Copies:
    """Local copies of the shards of a source, made when they are needed or announced. Thread-safe.

    folder: of these copies. The folders beside it belong to other sources, and share the space.
    sizes: bytes of each copy, estimated before it is made.
    make: (number of the shard, file) -> writes the copy.
    limit: bytes of all copies in all folders.
    """

    def __init__(self, folder: Path, sizes: Sequence[int], make: Callable[[int, Path], None], limit: float):
        self._folder, self._sizes, self._make, self._limit = folder, sizes, make, limit
        self._pending: dict[int, Future] = {}
        self._announced: frozenset[int] = frozenset()
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(THREADS)
        _all.add(self)

    def __call__(self, number: int) -> Path:
        """The copy of a shard. Waits until it is there. If nobody announced it, the next shard is copied too."""
        file = self._folder / str(number)
        if not file.exists():
            if number in self._announced:
                copying = self._request(number)
            else:
                copying, *_ = self.announce([n for n in (number, number + 1) if n < len(self._sizes)])
            copying.result()
        return file

    def announce(self, numbers: Iterable[int]) -> list[Future]:
        """Make the copies of these shards, in this order, in the background. They are the last to be removed.

        Returns a future of each.
        """
        numbers = list(numbers)
        self._announced = frozenset(numbers)
        for number in numbers:
            with contextlib.suppress(FileNotFoundError):
                os.utime(self._folder / str(number))
        return [self._request(number) for number in numbers]

    def _request(self, number: int) -> Future:
        with self._lock:
            future = self._pending.get(number)
            if future is None:
                future = self._pending[number] = Future()
                # no executor: the end of the program would wait for its threads
                threading.Thread(target=self._copy, args=(number, future), daemon=True).start()
            return future

    def _copy(self, number: int, future: Future) -> None:
        file, error = self._folder / str(number), None
        try:
            with self._turns:
                if not file.exists():
                    self._folder.mkdir(parents=True, exist_ok=True)
                    with self._room(self._sizes[number]), paths.written(file) as unfinished:
                        self._make(number, unfinished)
        except Exception as raised:  # handed to those who wait
            error = raised
        with self._lock:
            del self._pending[number]
        future.set_exception(error) if error else future.set_result(None)

    @contextlib.contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Remove the copies whose last use is longest ago, other sources' too, until one more of `size` bytes fits.

        Whoever has opened a removed copy can go on reading it. Raises OSError if the disk is full.
        """
        global _promised
        with _making_room:
            self._remove(self._limit - size - _promised)
            _promised += size
        try:
            if (free := paths.free_space(self._folder)) < size:
                raise OSError(
                    f"no space left in {self._folder}: {messages.size(size)} needed and {messages.size(free)} free; "
                    "free some, or name another disk by config.data.cache"
                )
            yield
        finally:
            with _making_room:
                _promised -= size

    def _remove(self, limit: float) -> None:
        """Remove copies until the others take at most `limit` bytes. Those that are announced stay."""
        kept = {each._folder / str(number) for each in list(_all) for number in each._announced}
        stats = {}
        for file in self._folder.parent.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove it now
                stats[file] = file.stat()
        total = sum(stat.st_size for file, stat in stats.items() if file.suffix != UNFINISHED)
        for file in sorted(stats, key=lambda file: stats[file].st_mtime):
            if file.suffix == UNFINISHED:
                if time.time() - stats[file].st_mtime > ABANDONED:
                    file.unlink(missing_ok=True)
            elif total > limit and file not in kept:
                file.unlink(missing_ok=True)
                total -= stats[file].st_size
