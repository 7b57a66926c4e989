"""The training loop: the same for every objective."""

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from diffusion_jax import hosts, parallel, paths
from diffusion_jax.paths import Path
from diffusion_jax.training import averages
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.endings import Diverged, Stopped
from diffusion_jax.training.logging import RunLog
from diffusion_jax.training.step import TrainState, init_state, initial_key, make_train_step
from diffusion_jax.training.times import measured
from diffusion_jax.training.tracing import Tracer, Wanted

NUM_CHECKPOINTS = 2  # the second is a spare in case the newest is damaged
_SYNC_POINTS = itertools.count(1)  # hosts agree on one of them; they never start again, not even with another stage


class Task(NamedTuple):
    """What to train.

    name: shown in the progress bar.
    loss: (params, frozen, batch, keys) -> (loss, metrics), see `objectives`.
    params: initial weights, in the host's memory.
    frozen: dict of inputs of the loss that are not trained.
    batches: step -> an iterator of this host's numpy batches after that step (`data.loader`).
    optimizer: optax.
    snapshot: averaged weights (numpy) -> picture (H, W, 3) uint8, called every train.snapshot_every steps. Or None.
    learning_rate: number of updates -> the rate of the next one, for the log. Or None.
    records: how many records this host has read and skipped, by these names, for the log.
    """

    name: str
    loss: Callable
    params: PyTree
    frozen: dict
    batches: Callable[[int], Iterator[PyTree]]
    optimizer: optax.GradientTransformation
    snapshot: Callable[[PyTree], np.ndarray] | None = None
    learning_rate: optax.Schedule | None = None
    records: Callable[[], dict[str, int]] = dict


def fit(task: Task, workdir: str | Path, train, seed: int, traces: Wanted | None = None) -> PyTree:
    """Train until `train.steps`, from the newest checkpoint if there is one. Returns the averaged weights as numpy.

    workdir: holds checkpoints/, metrics.jsonl, tensorboard/, times.json and profile/.
    train: config section with steps, batch_size (global), accumulate, parallel, ema, log_every, checkpoint_every,
      snapshot_every, max_bad_steps, post_hoc.
    traces: the steps to trace.
    Raises Stopped after SIGTERM or Ctrl-C, and Diverged after max_bad_steps updates in a row that were not finite. The
    last checkpoint is good in both cases.
    """
    workdir = paths.at(workdir)
    check_division(train)
    strategy, traces = parallel.strategy(train.parallel), traces or Wanted()

    def initial(params: PyTree) -> TrainState:
        return init_state(params, task.optimizer, seed, train.post_hoc)

    with Checkpoints(workdir / "checkpoints", NUM_CHECKPOINTS) as checkpoints:
        newest = checkpoints.latest_step()
        hosts.check_same(str(newest), "a newest checkpoint", "a shared disk may show new files late: start all again")
        if newest is None:
            state = strategy.create(initial, task.params)
        else:
            state = checkpoints.restore(strategy.shapes(jax.eval_shape(initial, task.params)))
            logging.info("going on from step %d of %s", int(state.step), checkpoints.folder)
            if not np.array_equal(state.key, initial_key(seed)):
                logging.warning(
                    "the seed is not that of %s: the noise goes on with its seed, the records come in the order of %d",
                    *(checkpoints.folder, seed),
                )
        if parallel.is_main():
            averages.forget_after(workdir / "averages", int(state.step))
        if int(state.step) < train.steps:
            checkpoints.warn_if_slow(state)
            traces.tell_if_missed(task.name, int(state.step), train.steps)
            state = _steps(task, state, workdir, train, strategy, checkpoints, traces)
        average = parallel.to_host(state.ema)
    hosts.meet("trained")
    return average


def _steps(
    task: Task,
    state: TrainState,
    workdir: Path,
    train,
    strategy: parallel.Strategy,
    checkpoints: Checkpoints,
    traces: Wanted,
) -> TrainState:
    """The state after the last step. Raises what `fit` raises."""
    start = int(state.step)
    train_step = make_train_step(task.loss, task.optimizer, train.ema, train.accumulate, strategy)
    batches, frozen = task.batches(start), strategy.place(task.frozen)
    with (
        _StopSignals() as stop,
        RunLog(workdir, start, train, task.name, task.learning_rate, task.records) as log,
        Tracer(traces, workdir, log.times) as tracer,
    ):
        times, previous = log.times, None
        train_step = measured(train_step, times, counts_flops=parallel.peak_flops() is not None)
        for step in range(start + 1, train.steps + 1):
            with tracer.step(step, task.name, previous):
                with times.of("data"):
                    batch = next(batches)
                state, metrics = train_step(state, frozen, strategy.split(batch))
            bad_in_row = times.started(metrics["bad_in_row"])
            log.step(metrics)
            _check_finite(previous, train.max_bad_steps, step - 1, checkpoints)
            previous = bad_in_row
            if step % train.log_every == 0 or step == train.steps:
                log.write(step)
            signalled = stop.requested()
            last = step == train.steps or signalled
            if last:
                _check_finite(bad_in_row, train.max_bad_steps, step, checkpoints)
            if last or step % train.checkpoint_every == 0:
                with times.of("checkpoint"):
                    log.publish()  # log and averages first, so that they have all steps of a checkpoint
                    _save_averages(state, step, workdir / "averages")
                    checkpoints.save(state)
            if task.snapshot and not signalled and (step % train.snapshot_every == 0 or step == train.steps):
                with times.of("snapshot"):
                    average = parallel.to_host(state.ema)
                    if parallel.is_main():
                        log.image(step, task.snapshot(average))
            if last:
                signalled = signalled or stop.requested()  # the signal may also arrive during the snapshot
                with times.of("checkpoint"):
                    checkpoints.finish()
            if signalled:
                raise Stopped(
                    f"stopped by {signalled} after step {step}; saved to {checkpoints.folder}; run again to go on"
                )
    return state


def _save_averages(state: TrainState, step: int, folder: Path) -> None:
    kept = parallel.to_host(state.averages)
    if kept and parallel.is_main():
        averages.save(folder, step, kept)


def check_division(train, devices: int | None = None) -> None:
    """Raise ValueError unless the devices can divide the weights and the global batch.

    train: config section with batch_size, accumulate and parallel.
    devices: their number, by default of all hosts.
    """
    devices = devices or parallel.num_devices()
    parallel.group(train.parallel, devices)
    if train.batch_size % (devices * train.accumulate):
        raise ValueError(
            f"train.batch_size={train.batch_size} does not divide over {devices} devices x {train.accumulate} "
            f"micro-batches; use a multiple of {devices * train.accumulate}"
        )


def check_resumed(workdir: Path, params: PyTree) -> None:
    """Raise ValueError if the checkpoint in the work directory does not fit `params`."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    if checkpoints.latest_step() is not None:
        checkpoints.check(params)


def _check_finite(bad_in_row: Callable[[], int] | None, limit: int, step: int, checkpoints: Checkpoints) -> None:
    # called with that of the step before the running one, so that the device does not wait
    if bad_in_row is not None and bad_in_row() >= limit:
        checkpoints.finish()
        last = checkpoints.latest_step()
        saved = "no checkpoint was saved before" if last is None else f"step {last} is saved in {checkpoints.folder}"
        raise Diverged(
            f"the loss was not finite for {limit} steps in a row, up to step {step}; {saved}; "
            "lower optimizer.learning_rate or check the data"
        )


@contextlib.contextmanager
def sigterm_raises_stopped() -> Iterator[None]:
    """Within this context SIGTERM raises Stopped outside of training steps: there is nothing to save.

    On several hosts SIGTERM waits for the next step instead, because it may reach only one of them.
    """

    def stop(number: int, _) -> None:
        signal.signal(number, before)
        raise Stopped("stopped by SIGTERM; run again to go on from the last checkpoint")

    if hosts.several():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _StopSignals:
    """Within this context the first SIGTERM or SIGINT (Ctrl-C) is recorded. The second ends the process as usual.

    On several hosts JAX records SIGTERM, lets all hosts agree on a step, and ignores further ones.
    """

    def __enter__(self) -> "_StopSignals":
        self._received = ""
        signals = (signal.SIGINT,) if hosts.several() else (signal.SIGTERM, signal.SIGINT)
        self._handlers = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._received and kind is None and not hosts.several():
            signal.raise_signal(signal.Signals[self._received])  # it came after the last step

    def requested(self) -> str:
        """The signal that asks the run to stop now, or "". Every host calls this after each step: all stop at once."""
        if hosts.several():
            stop = multihost_utils.reached_preemption_sync_point(next(_SYNC_POINTS))
            return self._received or "SIGTERM" if stop else ""
        return self._received

    def _receive(self, number: int, _) -> None:
        self._received = signal.Signals(number).name
        signal.signal(number, self._handlers[number])
        if hosts.several():
            signal.raise_signal(signal.SIGTERM)  # for JAX to tell the other hosts
