"""Scan shards in several processes at a time, because Python reads headers and texts on one core of each.

They are started as `python -m diffusion_jax.data.scanning MODULE SHARD`, and neither fork the threads of JAX nor import
the user's program.
"""

import collections
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from diffusion_jax import paths
from diffusion_jax.data.rows import Row


def in_processes(scan: Callable[[paths.Path], Iterator[Row]], shards: Sequence[paths.Path]) -> Iterator[list[Row]]:
    """The records of each shard, in order. Those of a few shards ahead wait in memory as they were sent.

    scan: a function named scan of a module.
    Raises what it raises.
    """
    count = min(os.cpu_count() or 1, len(shards))
    waiting: collections.deque[Future] = collections.deque()
    with ThreadPoolExecutor(count) as threads:
        for shard in shards:
            waiting.append(threads.submit(_in_process, scan.__module__, shard))
            if len(waiting) > 2 * count:
                yield _records(waiting.popleft().result())
        while waiting:
            yield _records(waiting.popleft().result())


def _records(sent: bytes) -> list[Row]:
    """What a process sent; raises the error if it is one."""
    result = pickle.loads(sent)
    if isinstance(result, Exception):
        raise result
    return result


def _in_process(module: str, shard: paths.Path) -> bytes:
    """What `main` writes about a shard."""
    command = [sys.executable, "-m", __name__, module, str(shard)]
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True)
    if done.returncode:
        raise OSError(f"{shard} cannot be scanned: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


def main(module: str, shard: str) -> None:
    """Write the records of a shard, or the error, to standard output."""
    try:
        result = list(importlib.import_module(module).scan(paths.at(shard)))
    except (OSError, ValueError) as error:
        result = error
    pickle.dump(result, sys.stdout.buffer)


if __name__ == "__main__":
    main(*sys.argv[1:])
