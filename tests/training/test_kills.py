"""A training that is killed again and again, at moments that nobody chose, ends as one left alone."""

import multiprocessing
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests.test_main import steps_saved, unfinished
from tests.training import test_loop

STEPS, EVERY = 160, 2
LIVES = 20
PROCESSES = multiprocessing.get_context("forkserver")  # one process imports JAX, and each life is a fork of it
PROCESSES.set_forkserver_preload(["tests.training.test_kills"])


def train(workdir):
    test_loop.fit(workdir, steps=STEPS, checkpoint_every=EVERY)


def life(workdir):
    """A process that trains."""
    process = PROCESSES.Process(target=train, args=(workdir,))
    process.start()
    return process


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_one_left_alone(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = time.monotonic()
    life(whole).join()
    seconds, dice, ends = time.monotonic() - begin, random.Random(0), []
    for number in range(LIVES):
        process = life(killed)
        if number % 2:  # during a save, the others at any time: at the start, while it compiles, in a step
            before = steps_saved(killed)
            while process.is_alive() and (steps_saved(killed) == before or not unfinished(killed)):
                time.sleep(0.001)
        else:
            process.join(dice.uniform(0, 0.2 * seconds))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            ends.append(bool(unfinished(killed)))
    assert len(ends) > 0.7 * LIVES and set(ends) == {True, False}, "most did not come to the end; some were in a save"
    last = life(killed)
    last.join()
    assert last.exitcode == 0 and steps_saved(killed) == steps_saved(whole) == [STEPS - EVERY, STEPS]
    jax.tree.map(np.testing.assert_array_equal, test_loop.saved(killed), test_loop.saved(whole))
    assert test_loop.metrics(killed) == test_loop.metrics(whole)
