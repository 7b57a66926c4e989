"""Traces of steps: as asked for, and the training goes on as if there were none."""

import signal
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from diffusion_jax.training import loop, tracing
from tests.test_main import finish, start, steps_saved, wait_until
from tests.training import linear
from tests.training.test_loop import Batches, saved


def traces(folder: Path) -> list[dict[str, list]]:
    """Name -> numbers of steps, of the events in each trace below a folder, oldest first."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime_ns)
    found = []
    for file in files:
        events = {}
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                events.setdefault(event.name, []).append(dict(event.stats).get("step_num"))
        found.append(events)
    return found


def fit(workdir, wanted, batches=None, **fields):
    task = loop.Task("linear", linear.loss, linear.initial(), linear.FROZEN, batches or Batches(), optax.adam(0.05))
    return loop.fit(task, workdir, linear.section(**fields), 0, wanted)


@pytest.mark.parametrize("flag, first, count", [(None, 0, 5), ("100:5", 100, 5), ("7:01", 7, 1)])
def test_the_flag_is_a_step_and_a_count(flag, first, count):
    wanted = tracing.wanted(flag)
    assert (wanted.first, wanted.count) == (first, count)


def test_the_named_steps_and_no_others_are_in_the_trace(tmp_path):
    """With what the host did, by the words of the log; and the weights are those of a run without."""
    traced, plain = fit(tmp_path / "traced", tracing.Wanted(4, 3)), fit(tmp_path / "plain", None)
    jax.tree.map(np.testing.assert_array_equal, traced, plain)
    (events,) = traces(tmp_path / "traced" / "profile" / "0")
    assert events["linear"] == [4, 5, 6]
    assert len(events["data"]) == 3 and len(events["checkpoint"]) == 1
    assert any(name.startswith("dot") for name in events), "what the device computes"
    assert not (tmp_path / "plain" / "profile").exists()


def test_a_signal_traces_the_next_steps_each_time(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    given = []

    class Signalled(Batches):
        def __next__(self):
            given.append(self.given)
            if self.given in (2, 6):
                signal.raise_signal(signal.SIGUSR1)
            return super().__next__()

    with tracing.Wanted(count=2) as wanted:
        fit(tmp_path / "traced", wanted, Signalled())
    assert signal.getsignal(signal.SIGUSR1) is before
    assert [events["linear"] for events in traces(tmp_path / "traced")] == [[4, 5], [8, 9]]
    fit(tmp_path / "plain", None)
    jax.tree.map(np.testing.assert_array_equal, saved(tmp_path / "traced"), saved(tmp_path / "plain"))


def test_a_trace_ends_with_the_training(tmp_path, caplog):
    with pytest.raises(loop.Stopped):
        fit(tmp_path, tracing.Wanted(5, 100), Batches(at=6, act=lambda: signal.raise_signal(signal.SIGTERM)))
    assert [events["linear"] for events in traces(tmp_path)] == [[5, 6]]
    fit(tmp_path, tracing.Wanted(5, 100))  # is past
    assert len(traces(tmp_path)) == 1 and "no trace of step 5, training goes from 7 to 12" in caplog.text
    assert saved(tmp_path).step == 12


@pytest.mark.parametrize("failing, said", [("start_trace", "could not begin"), ("stop_trace", "could not write")])
def test_a_trace_that_fails_costs_a_line(failing, said, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no space left on the disk\nat profiler.cc:7")

    stop = jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, failing, fail)
    try:
        fit(tmp_path, tracing.Wanted(2, 2), steps=4)
    finally:
        if failing == "stop_trace":
            stop()
    assert saved(tmp_path).step == 4
    (line,) = [record.getMessage() for record in caplog.records if "trace" in record.getMessage()]
    assert said in line and line.endswith(": no space left on the disk")


@pytest.mark.slow
def test_a_process_is_traced_by_flag_and_by_signal_and_is_not_disturbed(tmp_path):
    process = start("--mode=train", f"--workdir={tmp_path}", "--profile=2:3", "--config.train.steps=1000000")
    wait_until(lambda: steps_saved(tmp_path), process)
    process.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(list(tmp_path.rglob("*.xplane.pb"))) == 2, process)
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    assert status == 75 and stderr.splitlines()[-1].startswith("stopped by SIGTERM after step "), stderr
    first, second = traces(tmp_path / "profile" / "0")
    assert first["denoiser"] == [2, 3, 4] and np.diff(second["denoiser"]).tolist() == [1, 1]
    assert stderr.count("wrote a trace to ") == 2 and "trained " in stderr.splitlines()[-2]
