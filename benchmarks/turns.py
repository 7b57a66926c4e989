"""Side-by-side timing: each side runs in a process of its own, and the processes take turns.

While one process runs, the others are stopped (SIGSTOP), so that their spinning threads do not slow it down. Other load
on the machine affects all sides alike.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Side(NamedTuple):
    """seconds: of each turn. start: seconds from the process's start to its first answer. peak: bytes of memory.

    busy: seconds of all cores in each turn.
    """

    seconds: list[float]
    start: float
    peak: int
    busy: list[float]


def serve(run: Callable[[], object], warmups: int = 2) -> None:
    """Warm up and report it, then answer each line on stdin with the seconds of one run, after an unmeasured one."""
    for _ in range(warmups):
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            run()
        start, start_busy = time.perf_counter(), busy()
        run()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "peak": peak(), "busy": busy() - start_busy}), flush=True)


def busy() -> float:
    """Seconds that cores have spent on this process and on those that it has started and that still run."""
    children = [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in children]
    ticks = sum(int(ticks) for of_child in fields for ticks in of_child[11:13])  # in its own code and in the system's
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def peak() -> int:
    """The peak memory of this process so far, in bytes, including pages of mapped files."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(commands: dict[str, list[str]], turns: int, unmeasured: int = 1) -> dict[str, Side]:
    """Run the sides' commands, each of which calls `serve`, for so many turns of one measured run each.

    unmeasured: runs at the start of each turn, to warm the caches again.
    """
    servers, sides = {}, {}
    for side, command in commands.items():
        start = time.perf_counter()
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if server.stdout.readline() != "ready\n":
            raise SystemExit(f"{side}: did not start; its message is above")
        servers[side], sides[side] = server, Side([], time.perf_counter() - start, 0, [])
        server.send_signal(signal.SIGSTOP)
    for _ in range(turns):
        for side, server in servers.items():
            server.send_signal(signal.SIGCONT)
            server.stdin.write(f"{unmeasured}\n")
            server.stdin.flush()
            answer = json.loads(server.stdout.readline())
            server.send_signal(signal.SIGSTOP)
            sides[side].seconds.append(answer["seconds"])
            sides[side].busy.append(answer["busy"])
            sides[side] = sides[side]._replace(peak=answer["peak"])
    for server in servers.values():
        server.send_signal(signal.SIGCONT)
        server.stdin.close()
        server.wait()
    return sides


def commands(module: str, sides: Iterable[str], arguments: list[str]) -> dict[str, list[str]]:
    """The command of each side: this benchmark again, with --serve."""
    return {side: [sys.executable, "-m", module, "--serve", side, *arguments] for side in sides}
