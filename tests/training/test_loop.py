"""The loop: a run that was stopped, killed or has diverged goes on as if nothing had happened."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import parallel
from diffusion_jax.training import averages, loop
from diffusion_jax.training.checkpoints import Checkpoints
from tests.training import linear


class Killed(BaseException):
    """An exception that nothing catches, like kill -9."""


class Batches:
    """The batches of tests.training.linear; before the `at`-th of this process `act` is called; some are poisoned."""

    def __init__(self, size=8, at=None, act=None, poison=()):
        self.size, self.at, self.act, self.poison = size, at, act, poison
        self.given = 0

    def __call__(self, start):
        self.inner = linear.batches(self.size)(start)
        return self

    def __next__(self):
        self.given += 1
        if self.given == self.at:
            self.act()
        batch = next(self.inner)
        return batch | {"y": batch["y"] * np.nan} if self.given in self.poison else batch


def fit(workdir, batches=None, seed=0, **fields):
    task = loop.Task("linear", linear.loss, linear.initial(), linear.FROZEN, batches or Batches(), optax.adam(0.05))
    return jax.device_get(loop.fit(task, workdir, linear.section(**fields), seed))


def saved(workdir):
    """Everything that the newest checkpoint holds, as numpy arrays."""
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = loop.init_state(linear.initial(), optax.adam(0.05), 0)
    return jax.device_get(checkpoints.restore(parallel.strategy().shapes(state)))


def metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [linear.lasting(json.loads(line)) for line in lines]


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("whole")
    fit(workdir)
    return workdir


def stop(number=signal.SIGTERM):
    signal.raise_signal(number)  # to this thread: two of os.kill may arrive as one


def kill():
    raise Killed


def test_trains(whole):
    log = metrics(whole)
    assert [line["step"] for line in log] == [2, 4, 6, 8, 10, 12]
    assert log[-1]["loss"] < log[0]["loss"]
    assert saved(whole).step == 12


@pytest.mark.parametrize("at", [2, 6, 9])
def test_a_killed_run_goes_on_to_the_same_end(whole, tmp_path, at):
    with pytest.raises(Killed):
        fit(tmp_path, Batches(at=at, act=kill))
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1')  # cut off
    fit(tmp_path)
    assert_same(saved(tmp_path), saved(whole))
    assert metrics(tmp_path) == metrics(whole)


def test_averages_go_on_too(tmp_path):
    fit(tmp_path / "whole", post_hoc=True)
    with pytest.raises(Killed):
        fit(tmp_path / "killed", Batches(at=6, act=kill), post_hoc=True)
    fit(tmp_path / "killed", post_hoc=True)
    like = linear.initial()
    whole, killed = (averages.load(tmp_path / name / "averages", 12, 0.08, like) for name in ("whole", "killed"))
    assert averages.steps(tmp_path / "whole" / "averages") == [4, 8, 12]
    assert_same(whole, killed)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), whole, like)))


def test_averages_of_later_steps_are_forgotten(tmp_path):
    """The user moves the newest checkpoint away, and goes on from the one before at other steps."""
    fit(tmp_path, post_hoc=True, steps=8)
    (tmp_path / "checkpoints" / "8").rename(tmp_path / "away")
    fit(tmp_path, post_hoc=True, steps=9, checkpoint_every=9)
    assert averages.steps(tmp_path / "averages") == [4, 9]


def test_another_seed_is_told(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    fit(tmp_path, steps=13)
    assert "seed" not in caplog.text
    fit(tmp_path, steps=14, seed=1)
    assert "the noise goes on with its seed, the records come in the order of 1" in caplog.text


@pytest.mark.parametrize("at", [1, 6, 12])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_to_the_same_end(whole, tmp_path, at, number):
    before = signal.getsignal(number)
    with pytest.raises(loop.Stopped, match=f"stopped by {number.name} after step {at}; saved to") as stopped:
        fit(tmp_path, Batches(at=at, act=lambda: stop(number)))
    assert "\n" not in str(stopped.value)
    assert signal.getsignal(number) is before
    assert saved(tmp_path).step == at
    fit(tmp_path)
    assert_same(saved(tmp_path), saved(whole))
    assert [line["step"] for line in metrics(tmp_path)] == [line["step"] for line in metrics(whole)]


def test_the_second_ctrl_c_ends_the_process_at_once(whole, tmp_path):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as when a process starts

    def twice():
        stop(signal.SIGINT)
        stop(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Batches(at=6, act=twice))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    fit(tmp_path)
    assert_same(saved(tmp_path), saved(whole))


def test_a_signal_after_the_last_step_is_not_lost(tmp_path, monkeypatch):
    close = loop.RunLog.__exit__
    monkeypatch.setattr(loop.RunLog, "__exit__", lambda log, *exception: (stop(), close(log, *exception))[1])
    with loop.sigterm_raises_stopped(), pytest.raises(loop.Stopped, match="stopped by SIGTERM; run again"):
        fit(tmp_path)
    assert saved(tmp_path).step == 12


def test_sync_points_of_hosts_go_on_in_the_next_stage(monkeypatch):
    """Hosts that get a signal between two stages agree on the number after the last one: it must come soon."""
    points = []

    def reached(point):
        points.append(point)
        return len(points) == 3

    monkeypatch.setattr(loop.hosts, "several", lambda: True)
    monkeypatch.setattr(loop.multihost_utils, "reached_preemption_sync_point", reached)
    before = signal.getsignal(signal.SIGTERM)
    said = []
    for _ in range(2):
        with loop._StopSignals() as stop:
            assert signal.getsignal(signal.SIGTERM) is before, "JAX has it"
            said += [stop.requested(), stop.requested()]
    assert said == ["", "", "SIGTERM", ""]
    assert np.diff(points).tolist() == [1, 1, 1]


def test_sigterm_while_a_picture_is_drawn_loses_nothing(tmp_path):
    def snapshot(params):
        stop()
        return np.zeros((2, 2, 3), np.uint8)

    task = loop.Task("linear", linear.loss, linear.initial(), linear.FROZEN, Batches(), optax.adam(0.05), snapshot)
    for at, end in [(5, 6), (12, 12)]:
        with pytest.raises(loop.Stopped, match=f"after step {end}"):
            loop.fit(task, tmp_path, linear.section(snapshot_every=at), seed=0)
        assert saved(tmp_path).step == end
        assert (tmp_path / "samples" / f"step_{at:07d}.png").exists()


def test_a_finished_run_ends_at_once(whole):
    batches = Batches()
    average = fit(whole, batches)
    assert batches.given == 0
    assert_same(average, saved(whole).ema)


def test_a_finished_run_can_be_made_longer(whole, tmp_path):
    fit(tmp_path, steps=5)
    fit(tmp_path, steps=12)
    assert_same(saved(tmp_path), saved(whole))


def test_divergence_ends_the_run_and_keeps_the_last_good_weights(tmp_path):
    with pytest.raises(loop.Diverged, match=r"not finite for 3 steps in a row, up to step 9; step 8 is saved") as error:
        fit(tmp_path, Batches(poison=range(7, 100)))
    assert "\n" not in str(error.value)
    state = saved(tmp_path)
    assert (state.step, state.bad_steps, state.bad_in_row) == (8, 2, 2)
    fit(tmp_path / "good", steps=6)
    good = saved(tmp_path / "good")
    assert_same((state.params, state.ema, state.opt_state), (good.params, good.ema, good.opt_state))


def test_a_loss_that_is_not_finite_is_null_in_the_metrics(tmp_path):
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    fit(tmp_path, Batches(poison=(4,)))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line, parse_constant=no_constant)["loss"] for line in lines]
    assert [loss is None for loss in losses] == [False, True, False, False, False, False]


def test_divergence_before_the_first_checkpoint(tmp_path):
    with pytest.raises(loop.Diverged, match="no checkpoint was saved before"):
        fit(tmp_path, Batches(poison=range(1, 100)))


def test_a_few_bad_steps_are_only_counted(tmp_path):
    fit(tmp_path, Batches(poison=(2, 3, 5, 6)))
    state = saved(tmp_path)
    assert (state.step, state.bad_steps, state.bad_in_row) == (12, 4, 0)
    assert metrics(tmp_path)[-1]["bad_steps"] == 4


@pytest.mark.parametrize("batch_size, accumulate", [(7, 2), (8, 3)])
def test_a_batch_that_does_not_divide_is_one_clear_line(tmp_path, batch_size, accumulate):
    with pytest.raises(ValueError, match=rf"train.batch_size={batch_size} .* multiple of \d+") as error:
        fit(tmp_path, batch_size=batch_size, accumulate=accumulate)
    assert "\n" not in str(error.value)


def test_a_checkpoint_of_another_model_is_one_clear_line(whole, tmp_path):
    checkpoints = Checkpoints(whole / "checkpoints")
    for other in ({"w": np.zeros(5, np.float32), "b": np.float32(0)}, {"v": np.zeros(3, np.float32)}):
        with pytest.raises(ValueError, match="does not fit this config") as error:
            checkpoints.restore_ema(other)
        assert "\n" not in str(error.value)


def test_no_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoints(tmp_path / "checkpoints").restore_ema(linear.initial())


def test_the_first_step_compiles_and_is_no_part_of_the_speed(tmp_path, capsys):
    class Slow(Batches):
        def __next__(self):
            if not self.given:
                time.sleep(1)
            return super().__next__()

    fit(tmp_path, Slow(), steps=4, log_every=1, checkpoint_every=4, batch_size=8)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "images_per_second" not in lines[0] and all(line["images_per_second"] > 8 for line in lines[1:])
    assert "linear, compiling:   0%" in capsys.readouterr().err
