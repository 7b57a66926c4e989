"""Measure where the time of a training goes: into its steps, or into work during which the devices wait."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, SupportsInt

import jax
from jaxtyping import PyTree

from diffusion_jax.flops import flops
from diffusion_jax.paths import Path

STEP = "step"
WORDS = {
    STEP: "in steps",
    "compile": "compiling",
    "data": "waiting for data",
    "checkpoint": "in checkpoints",
    "snapshot": "in snapshots",
    "trace": "in traces",
}
UNITS = {"h": 3600, "min": 60, "s": 1}  # of a duration


class Times:
    """The seconds since this object was made, by kind of work. All time that no other kind has belongs to the steps.

    While the devices compute a step, the host may do other work or wait for the next data, and nothing is lost. So
    other work counts only from the moment when the devices have finished all steps that they were given. A thread notes
    these moments. It waits for each step instead of the training loop, so measuring does not make the loop wait.
    """

    def __init__(self):
        self.flops = 0.0  # of all steps
        self._start = time.perf_counter()
        self._others: dict[str, float] = {}
        self._thread = ThreadPoolExecutor(1, "steps")
        self._last: Future[tuple[int, float]] | None = None

    def close(self) -> None:
        """End the thread. No step may follow."""
        self._thread.shutdown(wait=False)

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        """Count the work in this context as one kind.

        kind: one of `WORDS`. Traces show the work by the same word.
        """
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(kind):
            yield
        end = time.perf_counter()
        self._others[kind] = self._others.get(kind, 0.0) + max(0.0, end - max(start, self._idle_since(end)))

    def _idle_since(self, now: float) -> float:
        """When the devices ended the last step; now if they have not."""
        if self._last is None:
            return self._start
        return self._last.result()[1] if self._last.done() else now

    def started(self, result: SupportsInt) -> Callable[[], int]:
        """Note that the devices were given a step. Returns a function that waits for its end and returns the result.

        result: one of the step's results, a scalar.
        """

        def wait() -> tuple[int, float]:
            return int(result), time.perf_counter()

        last = self._last = self._thread.submit(wait)
        return lambda: last.result()[0]

    def seconds(self) -> dict[str, float]:
        """The seconds so far, by kind."""
        return {STEP: time.perf_counter() - self._start - sum(self._others.values())} | self._others


def measured(step: Callable, times: Times, counts_flops: bool) -> Callable:
    """The same compiled step (state, frozen, batch), measured. Its first call with each batch size compiles.

    step: the compiled step.
    times: where to count.
    counts_flops: add up the FLOPs in `times.flops`. This traces the step once more for each batch size.
    """
    flops_of: dict[tuple, float] = {}

    def run(state: PyTree, frozen: PyTree, batch: PyTree) -> PyTree:
        sizes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        with contextlib.nullcontext() if sizes in flops_of else times.of("compile"):
            if sizes not in flops_of:
                flops_of[sizes] = flops(step, state, frozen, batch) if counts_flops else 0.0
            times.flops += flops_of[sizes]
            return step(state, frozen, batch)

    return run


class Account(NamedTuple):
    """What a run took so far, over all its starts. A start that was killed counts until its last checkpoint.

    first: the number of steps before those that the account covers; 0 if it covers the whole run.
    starts: how often the run was started.
    seconds: by kind of work.
    records: how many records this host has read and skipped; empty if its data do not count them.
    """

    first: int
    starts: int
    seconds: dict[str, float]
    records: dict[str, int]

    def plus(self, seconds: dict[str, float], records: dict[str, int]) -> "Account":
        """The account with the time and the records since the last start added."""
        return self._replace(seconds=_sum(self.seconds, seconds), records=_sum(self.records, records))

    def sentence(self, step: int) -> str:
        """The summary at the end of a run, one line. step: number of steps."""
        total = sum(self.seconds.values())
        unit = next((unit for unit, size in UNITS.items() if total >= size), "s")
        shares = sorted(self.seconds.items(), key=lambda item: -item[1])
        return "".join(
            (
                f"trained {f'steps {self.first + 1:,} to {step:,}' if self.first else f'{step:,} steps'}",
                f" in {total / UNITS[unit]:.1f} {unit}",
                f" of {self.starts} starts" if self.starts > 1 else "",
                ": " + ", ".join(f"{100 * seconds / total:.1f} % {WORDS.get(kind, kind)}" for kind, seconds in shares),
                "; records of this host: " if self.records else "",
                ", ".join(f"{count:,} {name}" for name, count in self.records.items()),
            )
        )


def opened(file: Path, start: int) -> Account:
    """The account of a run that is started now.

    file: where earlier starts have kept it, if there were any.
    start: number of steps that were done before.
    """
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        if start:
            before = Account(**json.loads(file.read_text()))
            return before._replace(starts=before.starts + 1)
    return Account(start, 1, {}, {})


def _sum(a: dict, b: dict) -> dict:
    return {name: a.get(name, 0) + b.get(name, 0) for name in a | b}
