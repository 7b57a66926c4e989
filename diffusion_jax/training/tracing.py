"""Traces of training steps, which TensorBoard and xprof open."""

import contextlib
import re
import signal
from collections.abc import Callable, Iterator

import jax
from absl import logging

from diffusion_jax import paths
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path
from diffusion_jax.training.times import Times

COUNT = 5  # steps that are traced after SIGUSR1, unless --profile gives a number


class Wanted:
    """Which steps to trace. Within this context SIGUSR1 asks for the next ones.

    first: step, 0 for none.
    count: steps of each trace.
    """

    def __init__(self, first: int = 0, count: int = COUNT):
        self.first, self.count, self._asked = first, count, False

    def __enter__(self) -> "Wanted":
        self._handler = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGUSR1, self._handler)

    def _ask(self, *_) -> None:
        self._asked = True

    def begins_at(self, step: int) -> bool:
        """Whether a trace is to begin with this step. This also answers a request by SIGUSR1."""
        asked, self._asked = self._asked, False
        return asked or step == self.first

    def tell_if_missed(self, name: str, start: int, steps: int) -> None:
        """Warn if the trace of --profile does not begin in a training that goes from step `start` to `steps`."""
        if self.first and not start < self.first <= steps:
            logging.warning("%s: no trace of step %d, training goes from %d to %d", name, self.first, start + 1, steps)


def wanted(flag: str | None) -> Wanted:
    """The steps that --profile asks for.

    flag: STEP:COUNT, or None.
    Raises ValueError for another text.
    """
    if flag is None:
        return Wanted()
    match = re.fullmatch(r"0*([1-9]\d*):0*([1-9]\d*)", flag)
    if not match:
        raise ValueError(f"--profile: expected STEP:COUNT, a first step and a number of steps, as 100:5, got {flag!r}")
    return Wanted(int(match[1]), int(match[2]))


class Tracer:
    """The traces of this host, in workdir/profile/HOST. Use it as a context manager.

    If a trace fails, a line says so and the training goes on.
    """

    def __init__(self, wanted: Wanted, workdir: Path, times: Times):
        self._wanted, self._times = wanted, times
        self._folder = workdir / "profile" / str(jax.process_index())
        self._spool: paths.Spool | None = None  # of the trace that is being made
        self._last = 0  # its last step

    def __enter__(self) -> "Tracer":
        return self

    def __exit__(self, *_) -> None:
        self._end()

    @contextlib.contextmanager
    def step(self, number: int, name: str, previous: Callable[[], int] | None) -> Iterator[None]:
        """Begin or end a trace at the start of a step.

        number, name: of the step and of its stage.
        previous: a function that waits for the step before, so that a trace ends with whole steps.
        """
        if self._spool and number > self._last:
            previous()
            self._end()
        if not self._spool and self._wanted.begins_at(number):
            self._begin(number)
        with jax.profiler.StepTraceAnnotation(name, step_num=number):
            yield

    def _begin(self, number: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python slow the steps, and there are many
        options.session_id = f"step_{number:07d}"  # by the second, a trace could overwrite another
        spool = paths.Spool(self._folder)
        try:
            with self._times.of("trace"):
                jax.profiler.start_trace(spool.folder, profiler_options=options)
        except Exception as error:  # the profiler passes on any error of its parts
            spool.close()
            logging.warning("could not begin a trace: %s", first_line(error))
        else:
            self._spool, self._last = spool, number + self._wanted.count - 1

    def _end(self) -> None:
        spool, self._spool = self._spool, None
        if spool is None:
            return
        with self._times.of("trace"):
            try:
                jax.profiler.stop_trace()
                spool.publish()
            except Exception as error:
                logging.warning("could not write a trace to %s: %s", self._folder, first_line(error))
            else:
                logging.info("wrote a trace to %s (BUILD.md says how to read it)", self._folder)
            finally:
                spool.close()
