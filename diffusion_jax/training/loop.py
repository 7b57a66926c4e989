"""The training loop: the same for every objective."""

import signal
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from diffusion_jax import parallel, paths
from diffusion_jax.paths import Path
from diffusion_jax.training import averages
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.logging import RunLog
from diffusion_jax.training.step import init_state, make_train_step

NUM_CHECKPOINTS = 2  # the second is a spare in case the newest is damaged


class Task(NamedTuple):
    """What to train.

    name: shown in the progress bar.
    loss: (params, frozen, batch, keys) -> (loss, metrics), see `objectives`.
    params: initial weights.
    frozen: dict of inputs of the loss that are not trained.
    batches: an iterator of numpy batches with get_state and set_state (`data.loader`).
    optimizer: optax.
    snapshot: averaged weights -> picture (H, W, 3) uint8, called every train.snapshot_every steps. Or None.
    """

    name: str
    loss: Callable
    params: PyTree
    frozen: dict
    batches: object
    optimizer: optax.GradientTransformation
    snapshot: Callable[[PyTree], np.ndarray] | None = None


class Stopped(Exception):
    """The run received SIGTERM or SIGINT and has saved its state."""


class Diverged(ArithmeticError):
    """The loss was not finite for too many steps in a row."""


def fit(task: Task, workdir: str | Path, train, seed: int) -> PyTree:
    """Train until `train.steps`, from the newest checkpoint if there is one. Returns the averaged weights as numpy.

    workdir: holds checkpoints/, metrics.jsonl and tensorboard/.
    train: config section with steps, batch_size (global), ema, accumulate, log_every, checkpoint_every, snapshot_every,
      max_bad_steps, post_hoc.
    Raises Stopped after SIGTERM or Ctrl-C, and Diverged after max_bad_steps updates in a row that were not finite. The
    last checkpoint is good in both cases.
    """
    workdir = paths.at(workdir)
    check_batch_size(train.batch_size, train.accumulate)
    checkpoints = Checkpoints(workdir / "checkpoints", NUM_CHECKPOINTS)
    state = parallel.replicate(init_state(task.params, task.optimizer, seed, train.post_hoc))
    if checkpoints.latest_step() is not None:
        state, data_state = checkpoints.restore(state)
        task.batches.set_state(data_state)
        logging.info("going on from step %d of %s", int(state.step), checkpoints.folder)
    start = int(state.step)
    if start >= train.steps:
        return parallel.to_host(state.ema)

    train_step = make_train_step(task.loss, task.optimizer, train.ema, train.accumulate)
    frozen = parallel.replicate(task.frozen)
    with RunLog(workdir, start, train.steps, train.batch_size, task.name) as log, _StopSignals() as stop:
        previous = None
        for step in range(start + 1, train.steps + 1):
            batch = parallel.split(next(task.batches))
            state, metrics = train_step(state, frozen, batch)
            log.step(metrics)
            _check_finite(previous, train.max_bad_steps, step - 1, checkpoints)
            previous = metrics
            if step % train.log_every == 0 or step == train.steps:
                log.write(step)
            signalled = stop.requested(step)
            last = step == train.steps or signalled
            if last:
                _check_finite(metrics, train.max_bad_steps, step, checkpoints)
            if last or step % train.checkpoint_every == 0:
                log.publish()  # first, so that the log has all steps of a checkpoint
                checkpoints.save(state, task.batches.get_state())
                if train.post_hoc and parallel.is_main():
                    averages.save(workdir / "averages", step, parallel.to_host(state.averages))
            if task.snapshot and parallel.is_main() and (step % train.snapshot_every == 0 or step == train.steps):
                log.image(step, task.snapshot(parallel.to_host(state.ema)))
            if step == train.steps:
                signalled = stop.requested(step)  # the signal may also arrive during the snapshot
            if signalled:
                raise Stopped(
                    f"stopped by {signalled} after step {step}; saved to {checkpoints.folder}; run again to go on"
                )
    return parallel.to_host(state.ema)


def check_batch_size(batch_size: int, accumulate: int) -> None:
    """Raise ValueError unless the global batch can be divided into devices and micro-batches."""
    devices = parallel.num_devices()
    if batch_size % (devices * accumulate):
        raise ValueError(
            f"train.batch_size={batch_size} does not divide over {devices} devices x {accumulate} micro-batches; "
            f"use a multiple of {devices * accumulate}"
        )


def check_resumed(workdir: Path, params: PyTree) -> None:
    """Raise ValueError if the checkpoint in the work directory does not fit `params`."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    if checkpoints.latest_step() is not None:
        checkpoints.check(params)


def _check_finite(metrics: dict | None, limit: int, step: int, checkpoints: Checkpoints) -> None:
    # called with the metrics of the step before the running one, so that the device does not wait
    if metrics is not None and int(metrics["bad_in_row"]) >= limit:
        last = checkpoints.latest_step()
        saved = "no checkpoint was saved before" if last is None else f"step {last} is saved in {checkpoints.folder}"
        raise Diverged(
            f"the loss was not finite for {limit} steps in a row, up to step {step}; {saved}; "
            "lower optimizer.learning_rate or check the data"
        )


class _StopSignals:
    """Within this context the first SIGTERM or SIGINT (Ctrl-C) is recorded. The second ends the process as usual."""

    def __enter__(self) -> "_StopSignals":
        self._received = ""
        # the signal may reach only one of several hosts: JAX then lets all hosts agree on a step
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._handlers = {number: signal.signal(number, self._receive) for number in signals}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> str:
        """The signal that asks the run to stop after `step`, or "". The same on every host."""
        if not self._handlers:
            return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else ""
        return self._received

    def _receive(self, number: int, _) -> None:
        self._received = signal.Signals(number).name
        signal.signal(number, self._handlers[number])
