"""Several hosts, each a process of one run: they find one another, meet, agree, and end together."""

import contextlib
import ctypes
import hashlib
import os
import re
import signal
import sys
import threading
import time
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxlib import utils

from diffusion_jax import parallel
from diffusion_jax.messages import Progress, first_line

HEARTBEAT = 30  # seconds of silence after which a host counts as dead
SHUTDOWN = 15  # seconds that hosts wait for one another at the end, after they have met
MOMENT = 2  # seconds between the message of a host that fails and its end
NO_LOG = 4  # a log level above FATAL
LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"  # the variable by which users ask for what the runtime logs: 0 is all
ERROR, AGAIN = 2, 75  # exit statuses: mend something; run it again (EX_TEMPFAIL: Kubernetes, Slurm and systemd do it)
MESSAGE_BYTES = 1024
LOST = (
    "this host lost the others: the host that ended first says why; "
    f"run all hosts again to go on from the last checkpoint; {LOG_LEVEL}=0 shows the runtime's own messages"
)

# The runtime and this program may find at the same time that another host is dead. The first thread that takes this
# lock ends the process, and none that comes later says it again.
_ending = threading.RLock()
_last_words = ("", ERROR)  # what `_at_abort` prints, and the exit status


def connect(
    wanted: bool | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    stop_together: bool = True,
) -> None:
    """Connect this process to the other hosts of the run, if there are any. Call this before JAX finds its devices.

    wanted: True if there are several hosts, and the cluster says which one this is. False for one host. None means
      `several_found`.
    coordinator, processes, process: HOST:PORT of host 0, the number of hosts, and the number of this host from 0. Give
      all or none of them. They replace what the cluster says.
    stop_together: SIGTERM, which may reach only one host, is recorded for
      `multihost_utils.reached_preemption_sync_point`. Otherwise it ends the process as usual.

    From then on the process ends with one line and status 2 as soon as another host is dead.
    Raises ValueError for a bad combination, and OSError if the hosts do not find one another.
    """
    place = _checked_place(wanted, coordinator, processes, process)
    if not (place or several_found() if wanted is None else wanted):
        return
    jax.config.update("jax_enable_preemption_service", stop_together)
    where = f"at {coordinator}" if place else "through the cluster"
    _end_with(f"this host found no others {where}: start the same command on every host, within five minutes")
    try:
        jax.distributed.initialize(
            *place,
            cluster_detection_method="deactivate" if place else None,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except Exception as error:  # JAX passes on any error of a cluster's environment
        raise OSError(
            f"cannot meet the other hosts {where}: {first_line(error)}"
            if place
            else f"found no other hosts ({first_line(error)}): give --coordinator=HOST:PORT --processes=N --process=I, "
            "or --nodistributed for one host"
        ) from error
    _end_with(LOST, AGAIN)


def several_found() -> bool:
    """Whether the environment says that this process is one of several: on a TPU slice or in a Slurm step."""
    environment = os.environ
    if len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        return True
    in_step = all(f"SLURM_{name}" in environment for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"))
    tasks = environment.get("SLURM_NTASKS", "1")
    # an interactive shell is a step of one task, in a job of many
    return in_step and int(tasks) > 1 and int(environment.get("SLURM_STEP_NUM_TASKS", tasks)) > 1


def _checked_place(
    wanted: bool | None, coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int] | tuple[()]:
    """(coordinator, processes, process), empty if none is given."""
    place = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in place.items() if value is None]
    if len(missing) == len(place):
        return ()
    if missing:
        raise ValueError(f"--coordinator, --processes and --process go together: give also {', '.join(missing)}")
    if wanted is False:
        raise ValueError("--nodistributed is one host: leave it out, or leave out --coordinator and its companions")
    port = re.fullmatch(r"(?:[^\s:]+|\[[^\s\]]+\]):(\d+)", coordinator)
    if not port or not 0 < int(port[1]) < 65536:
        raise ValueError(f"--coordinator: expected HOST:PORT of host 0, e.g. 10.0.0.2:8476, got {coordinator!r}")
    if processes < 1 or not 0 <= process < processes:
        raise ValueError(
            f"--process: expected a number from 0 to --processes - 1, got --process={process} of {processes}"
        )
    return coordinator, processes, process


def several() -> bool:
    """Whether `connect` made this process one host of several. Works before JAX finds its devices."""
    return jax.distributed.is_initialized()


def meet(name: str) -> None:
    """Wait until every host calls this with the same name."""
    if several():
        multihost_utils.sync_global_devices(name)


def raise_together(error: Exception | None) -> None:
    """Raise OSError on every host if one has an error, so that no host waits for it. Every host must call this."""
    if not several():
        if error:
            raise error
        return
    message = ("" if error is None else str(error) or repr(error)).encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES)
    for host, row in enumerate(parallel.from_all_hosts(np.frombuffer(message, np.uint8))):
        if text := row.tobytes().decode(errors="ignore").strip():
            raise OSError(f"host {host}: {text}") from error


def check_same(value: str, what: str, advice: str = "start every host with the same command") -> None:
    """Raise ValueError, on every host, unless the value is the same on all of them.

    value: compared between the hosts.
    what, advice: for the message: a name of the value, and what to do.
    """
    digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint8)
    rows = _rows(digest)
    others = [host for host, row in enumerate(rows) if not np.array_equal(row, rows[0])]
    if others:
        raise ValueError(f"host {others[0]} has {what} other than host 0: {advice}")


def token() -> str:
    """A new random name, the same on every host."""
    return _rows(np.frombuffer(os.urandom(16), np.uint8))[0].tobytes().hex()


def _rows(array: np.ndarray) -> np.ndarray:
    return parallel.from_all_hosts(array) if several() else array[None]


def finish(status: int) -> None:
    """Wait for all hosts at the end of their work. It is not an error if one has already ended.

    status: exit status that follows.
    """
    if several():
        _end_with("", status)
        with contextlib.suppress(Exception):  # what the runtime raises when a host is gone
            meet("end")


def leave(status: int, message: str) -> NoReturn:
    """Print the message and end this process soon, without waiting for the other hosts, which may be waiting for it.

    The others get a moment first. They may be about to end with the same message, which says more than `LOST`.
    """
    _ending.acquire()
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(MOMENT)
    os._exit(status)


def _end_with(message: str, status: int = ERROR) -> None:
    """From now on, if the runtime gives up, print this and exit with this status. "" prints nothing.

    When another host is dead, the runtime logs a page and aborts. No Python code runs then but a handler of SIGABRT in
    the thread that aborts, for which Python's own `signal` is too late.
    """
    global _last_words
    _last_words = message, status
    if os.environ.get(LOG_LEVEL) != "0":
        utils.absl_set_min_log_level(NO_LOG)
    ctypes.CDLL(None).signal(signal.SIGABRT, _at_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _at_abort(_: int) -> None:
    _ending.acquire()
    message, status = _last_words
    if message:
        line_end = "\n" if Progress.on_screen else ""
        os.write(2, f"{line_end}error: {message}\n".encode())
    os._exit(status)
