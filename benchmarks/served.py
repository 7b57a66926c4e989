"""A server of the demo in a process of its own, for benchmarks that are its clients."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from benchmarks.quick import ROOT


class Served(NamedTuple):
    """A server that runs. address: http://HOST:PORT. process: its number. begun: `time.monotonic()` of its start."""

    address: str
    process: int
    begun: float

    @property
    def memory(self) -> int:
        """Bytes in memory of the server and its worker."""
        children = Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (self.process, *children)]
        return 4096 * sum(pages)


@contextlib.contextmanager
def served(*flags: str, preset: str = "", warm: bool = True) -> Iterator[Served]:
    """The server, as soon as it listens.

    flags: added to the command.
    preset: of configs/latent_cfg.py.
    warm: wait until it has compiled all of its programs.
    """
    begun = time.monotonic()
    config = f"--config=configs/latent_cfg.py{preset and f':{preset}'}"
    command = [sys.executable, "main.py", config, "--mode=serve", "--config.serve.port=0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(process.stderr.readline, "")
        address = next((match[0] for line in lines if (match := re.search(r"http://\S+", line))), None)
        if address is None:
            sys.exit(f"the server did not start: {' '.join(process.args)}")
        while warm and httpx.get(f"{address}/health").json()["status"] != "ready":
            time.sleep(0.2)
        yield Served(address, process.pid, begun)
    finally:
        process.terminate()
        process.wait()
