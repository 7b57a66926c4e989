"""Several hosts from the command line: how they find one another, share a run, and end together.

Real processes on the loopback, where hosts matter.
"""

import functools
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest

from configs import digits
from diffusion_jax import hosts
from diffusion_jax.training import loop
from diffusion_jax.training.checkpoints import Checkpoints
from tests.command_line import ROOT
from tests.ports import free_port
from tests.test_main import TINY, TWO_STAGES, finish, start, steps_saved, unfinished, wait_until
from tests.training import linear as model

TOGETHER = 60  # seconds in which all hosts end after one of them

# a config that trains the smallest model there is, which compiles in no time; FAULT is for one host to have
LINEAR = """
import jax
import optax

from configs import digits
from diffusion_jax.app import train, workdir
from diffusion_jax.training import loop
from tests.training import linear

def loss(params, frozen, batch, keys):
    return linear.loss(params, frozen, batch, keys)

def batches(start):
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    for step, batch in enumerate(linear.batches(8 // jax.process_count(), **share)(start)):
        if jax.process_index() == 1 and step == 5:
            FAULT
        yield batch

def run(config, folder):
    with workdir.locked(folder):
        task = loop.Task("linear", loss, linear.initial(), linear.FROZEN, batches, optax.adam(0.05))
        section = linear.section(steps=STEPS, log_every=1, checkpoint_every=3)
        loop.fit(task, folder, section, config.seed)

train.run = run
get_config = digits.get_config
"""


def start_two(*workdirs, flags=(), base, cwd=ROOT):
    """Two hosts that train, each in its work directory, or both in the only one."""
    port = free_port()
    return [
        start(
            "--mode=train",
            f"--workdir={workdirs[i % len(workdirs)]}",
            f"--coordinator=127.0.0.1:{port}",
            "--processes=2",
            f"--process={i}",
            *flags,
            base=base,
            cwd=cwd,
        )
        for i in range(2)
    ]


@pytest.fixture
def linear(tmp_path):
    """fault -> the flags of such a config."""

    def flags(fault="pass", steps=10**6):
        (tmp_path / "linear.py").write_text(LINEAR.replace("FAULT", fault).replace("STEPS", str(steps)))
        return [f"--config={tmp_path}/linear.py"]

    return flags


def errors(stderr):
    """The errors that were said, in one line each or not."""
    lines = [line.split("\r")[-1] for line in stderr.splitlines()]
    return [line for line in lines if line.startswith("error: ") or "Traceback" in line or ".cc:" in line]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def logged(workdir):
    return (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_size > 0


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
PLACE = ("10.0.0.2:8476", 4, 3)


@pytest.fixture
def connected(monkeypatch):
    """The calls of `jax.distributed.initialize`, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kwargs: calls.append((args, kwargs)))
    monkeypatch.setattr(hosts, "_end_with", lambda *_: None)
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_STEP_NUM_TASKS", *SLURM):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "environment, several",
    [
        ({}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.2,10.0.0.3"}, True),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # an interactive shell in a job of two tasks
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a batch script, outside of srun
    ],
)
def test_hosts_are_found_on_clusters_and_nowhere_else(environment, several, connected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    hosts.connect()
    assert bool(connected) == several
    hosts.connect(False)
    assert bool(connected) == several, "--nodistributed is one host"


def test_a_dead_host_is_noticed_within_a_minute(connected):
    hosts.connect(None, *PLACE)
    hosts.connect(True)
    for (place, options), expected in zip(connected, (PLACE, ()), strict=True):
        assert place == expected
        # a host sends a sign of life every half of the timeout
        assert 1.5 * options["heartbeat_timeout_seconds"] + options["shutdown_timeout_seconds"] <= TOGETHER
    assert jax.config.jax_enable_preemption_service


def test_sigterm_ends_an_evaluation_as_usual(connected):
    hosts.connect(None, *PLACE, stop_together=False)
    try:
        assert not jax.config.jax_enable_preemption_service
    finally:
        jax.config.update("jax_enable_preemption_service", True)


def test_where_there_is_no_cluster_one_line_says_what_to_give(monkeypatch):
    monkeypatch.setattr(hosts, "_end_with", lambda *_: None)  # it is for the whole life of a process
    with pytest.raises(OSError, match=r"found no other hosts .* give --coordinator=HOST:PORT --processes=N") as error:
        hosts.connect(True)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_two_hosts_train_a_first_stage_and_then_the_denoiser(tmp_path):
    (tmp_path / "two_stages.py").write_text(TWO_STAGES)
    base, workdir = [f"--config={tmp_path}/two_stages.py"], tmp_path / "run"
    flags = ["--config.autoencoder.train.steps=3", *TINY[1:6]]  # the smallest U-Net
    for status, stderr in map(finish, start_two(workdir, flags=flags, base=base)):
        assert status == 0, stderr
    first = workdir / "autoencoder"
    assert steps_saved(first) == [3] and steps_saved(workdir) == [2]
    assert json.loads((first / "config.json").read_text())["scaling_factor"] > 0
    assert json.loads((first / "validation.json").read_text())["images"] > 0


@pytest.mark.slow
def test_a_work_directory_on_each_hosts_own_disk_is_noticed_at_the_start(linear, tmp_path):
    for status, stderr in map(finish, start_two(tmp_path / "disk0", tmp_path / "disk1", base=linear())):
        assert status == 2, stderr
        assert len(errors(stderr)) == 1 and f"host 1: {tmp_path}/disk1 is not the folder of host 0" in stderr, stderr
    assert not logged(tmp_path / "disk0")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_host_stops_all_after_the_same_step(number, linear, tmp_path):
    processes = start_two(tmp_path / "run", base=linear())
    wait_until(lambda: logged(tmp_path / "run"), processes[0])
    processes[1].send_signal(number)
    for status, stderr in map(finish, processes):
        step = steps_saved(tmp_path / "run")[-1]
        assert status == 75 and not errors(stderr), stderr
        assert "stopped by " in stderr and f"after step {step}; saved to" in stderr.splitlines()[-1], stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])  # SIGSTOP: as if its network were cut
@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_host_is_killed_the_other_ends_with_one_line(killed, number, linear, tmp_path):
    processes = start_two(tmp_path / "run", base=linear())
    wait_until(lambda: logged(tmp_path / "run"), processes[0])
    processes[killed].send_signal(number)
    begin = time.monotonic()
    status, stderr = finish(processes[1 - killed])
    seconds = time.monotonic() - begin
    processes[killed].kill()
    finish(processes[killed])
    assert seconds < TOGETHER
    assert status == 75 and len(errors(stderr)) == 1 and "this host lost the others" in stderr, stderr


@pytest.mark.slow
def test_a_host_killed_during_a_save_costs_no_more_than_that_checkpoint(linear, tmp_path):
    def saves(before):
        return steps_saved(tmp_path / "run") != before and unfinished(tmp_path / "run")

    for killed in (0, 1):
        saves_another = functools.partial(saves, before=steps_saved(tmp_path / "run"))
        processes = start_two(tmp_path / "run", base=linear())
        wait_until(saves_another, processes[0], pause=0.001)
        processes[killed].kill()
        (_, _), (status, stderr) = finish(processes[killed]), finish(processes[1 - killed])
        assert status in (2, 75) and len(errors(stderr)) == 1, stderr  # it may say that it could not save
    steps = steps_saved(tmp_path / "run")[-1] + 5
    assert [finish(process)[0] for process in start_two(tmp_path / "run", base=linear(steps=steps))] == [0, 0]
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, steps + 1))
    task = loop.Task("linear", model.loss, model.initial(), model.FROZEN, model.batches(8), optax.adam(0.05))
    section = model.section(steps=steps, log_every=1, checkpoint_every=steps)
    alone = loop.fit(task, tmp_path / "alone", section, digits.get_config().seed)
    together = Checkpoints(tmp_path / "run" / "checkpoints").restore_ema(model.initial())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, status, last_line",
    [("OSError('the disk is gone')", 2, "error: the disk is gone"), ("KeyError('a bug')", 1, "KeyError: 'a bug'")],
)
def test_an_exception_on_one_host_ends_both(error, status, last_line, linear, tmp_path):
    zero, one = map(finish, start_two(tmp_path / "run", base=linear(f"raise {error}")))
    assert one[0] == status and one[1].strip().splitlines()[-1] == last_line, one[1]
    assert zero[0] == 75 and len(errors(zero[1])) == 1 and "this host lost the others" in zero[1], zero[1]


TWO_ENDINGS = """
import sys, threading, time
from diffusion_jax import hosts

class Slow:  # a terminal that takes its time, so that the runtime gives up in between
    def write(self, text):
        time.sleep(0.5)
        sys.__stderr__.write(text)
    flush = sys.__stderr__.flush

hosts._last_words = "second", 2
sys.stderr = Slow()
threading.Timer(0.2, hosts._at_abort, [6]).start()
hosts.leave(1, "error: first")
"""


def test_the_program_and_the_runtime_do_not_both_say_that_a_host_is_lost():
    done = subprocess.run([sys.executable, "-c", TWO_ENDINGS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, "error: first\n")


def test_hosts_that_see_other_checkpoints_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts.parallel, "from_all_hosts", lambda array: np.stack([array, array ^ 1]))
    task = loop.Task("linear", model.loss, model.initial(), model.FROZEN, model.batches(8), optax.adam(0.05))
    with pytest.raises(ValueError, match=r"^host 1 has a newest checkpoint other than host 0: a shared disk may show"):
        loop.fit(task, tmp_path, model.section(), seed=0)


def test_an_end_after_another_host_has_gone_is_no_error(monkeypatch):
    def gone(name):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection closed")

    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts, "_end_with", lambda message, status: ends.append((message, status)))
    monkeypatch.setattr(hosts.multihost_utils, "sync_global_devices", gone)
    ends = []
    hosts.finish(75)
    assert ends == [("", 75)]


def test_hosts_with_other_configs_say_so(monkeypatch):
    monkeypatch.setattr(hosts, "several", lambda: True)
    monkeypatch.setattr(hosts.parallel, "from_all_hosts", lambda array: np.stack([array, array]))
    hosts.check_same("steps: 3", "a config")
    monkeypatch.setattr(hosts.parallel, "from_all_hosts", lambda array: np.stack([array, array ^ 1]))
    with pytest.raises(ValueError, match="host 1 has a config other than host 0: start every host with the same"):
        hosts.check_same("steps: 3", "a config")
