"""What a training tells about itself: where its time goes, of which the parts make up the whole."""

import json
import logging
import re
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from diffusion_jax import parallel
from diffusion_jax.data.loader import Tally, loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord
from diffusion_jax.flops import flops
from diffusion_jax.training import loop, times
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.step import init_state
from tests.training import linear
from tests.training.test_loop import Batches

SLOW = 0.3  # seconds of what is made slow
NOISE = 0.15  # seconds that a busy machine may add


class Device:
    """A result of a step that the device has computed at a time."""

    def __init__(self, seconds, value=0):
        self.end, self.value = time.perf_counter() + seconds, value

    def __int__(self):
        time.sleep(max(0.0, self.end - time.perf_counter()))
        return self.value


@pytest.mark.parametrize(
    "step, data, lost",
    [(0.6, 0.3, 0), (0.3, 0.6, 0.3), (0, 0.3, 0.3)],  # seconds of a step, until its data come, the device has none
)
def test_only_data_that_the_device_waits_for_count(step, data, lost):
    """A source as quick as the device, with whose work it overlaps, costs nothing."""
    clock = times.Times()
    started = time.perf_counter()
    clock.started(Device(step))
    with clock.of("data"):
        time.sleep(data)
    wait = clock.started(Device(step, 7))
    assert wait() == 7
    seconds, whole = clock.seconds(), time.perf_counter() - started
    assert abs(seconds["data"] - lost) < NOISE and abs(sum(seconds.values()) - whole) < NOISE


def test_the_error_of_a_step_reaches_who_waits_for_it():
    class Broken:
        def __int__(self):
            raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        times.Times().started(Broken())()


class SlowBatches(Batches):
    def __next__(self):
        time.sleep(SLOW)
        return super().__next__()


def task(batches, snapshot=None, records=dict, rate=None):
    initial = linear.initial()
    return loop.Task("linear", linear.loss, initial, linear.FROZEN, batches, optax.adam(0.05), snapshot, rate, records)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def shares(line):
    return {name.removeprefix("share/"): value for name, value in line.items() if name.startswith("share/")}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, last lines of its starts, their seconds): stopped after step 6 of 12 whose data were slow, then its
    checkpoints and pictures were.
    """
    workdir, told, seconds = tmp_path_factory.mktemp("run"), [], []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    save = Checkpoints.save

    def slow_save(self, state):
        time.sleep(SLOW)
        save(self, state)

    def slow_picture(params):
        time.sleep(2 * SLOW)
        return np.zeros((4, 4, 3), np.uint8)

    log = logging.getLogger("absl")
    log.addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        begin = time.perf_counter()
        slow = SlowBatches(at=6, act=lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(loop.Stopped):
            loop.fit(task(slow), workdir, linear.section(checkpoint_every=100), seed=0)
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", slow_save)
            section = linear.section(log_every=1, snapshot_every=10)
            loop.fit(task(Batches(), slow_picture), workdir, section, seed=0)
        seconds.append(time.perf_counter() - begin)
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return workdir, [line for line in told if line.startswith("trained ")], seconds


def test_shares_make_up_the_whole(run):
    assert [line["step"] for line in lines(run[0])] == [2, 4, 6, *range(7, 13)]
    for line in lines(run[0]):
        assert abs(sum(shares(line).values()) - 1) < 1e-6 and min(shares(line).values()) >= 0
        assert shares(line)["step"] > 0 and line["step_seconds"] > 0


def test_a_slow_source_is_seen_as_such(run):
    of = {line["step"]: shares(line) for line in lines(run[0])}
    assert of[4]["data"] > 0.5 and of[6]["data"] > 0.5
    assert of[9]["data"] < 0.5 and of[11]["data"] < 0.5


def test_compiling_is_in_the_first_line_of_each_start(run):
    assert [line["step"] for line in lines(run[0]) if shares(line)["compile"]] == [2, 7]


def test_slow_checkpoints_and_pictures_are_seen_as_such(run):
    """In the line after them."""
    of = {line["step"]: shares(line) for line in lines(run[0])}
    assert of[9]["checkpoint"] > 0.5 and of[11]["snapshot"] > 0.5
    assert of[10]["checkpoint"] == of[12]["checkpoint"] == of[12]["snapshot"] == 0


def test_the_last_line_covers_all_starts(run):
    workdir, (first, second), seconds = run
    assert re.match(r"trained 6 steps in [\d.]+ (s|min): \d", first)
    assert re.match(r"trained 12 steps in [\d.]+ (s|min) of 2 starts: \d", second)
    parts = dict((name, float(value)) for value, name in re.findall(r"([\d.]+) % ([a-z ]+)", second))
    assert parts.keys() == {times.WORDS[kind] for kind in ("step", "compile", "data", "checkpoint", "snapshot")}
    assert abs(sum(parts.values()) - 100) < 0.3
    kept = json.loads((workdir / "times.json").read_text())["seconds"]
    assert kept["data"] > 5 * SLOW, "those of the first start are in it"
    assert kept["checkpoint"] > 2 * SLOW and kept["snapshot"] > 4 * SLOW
    assert sum(kept.values()) < sum(seconds)


def test_the_account_of_a_run_says_what_it_covers(tmp_path):
    file = tmp_path / "times.json"
    whole = times.opened(file, 0).plus({"step": 3.6e3 * 93, "data": 3.6e3 * 7}, {"read": 3_200_000, "skipped": 12})
    assert whole.sentence(400_000) == (
        "trained 400,000 steps in 100.0 h: 93.0 % in steps, 7.0 % waiting for data; "
        "records of this host: 3,200,000 read, 12 skipped"
    )
    file.write_text(json.dumps(whole._asdict()))
    again = times.opened(file, 400_000).plus({"step": 1.0}, {"read": 8})
    assert (again.starts, again.records) == (2, {"read": 3_200_008, "skipped": 12})
    assert times.opened(file, 0).starts == 1, "a run without a checkpoint begins anew"
    for text in ("", '{"other": 1}', "[1]"):
        file.write_text(text)
        part = times.opened(file, 4).plus({"step": 90.0}, {})
        assert part.sentence(12) == "trained steps 5 to 12 in 1.5 min: 100.0 % in steps"


class Counted:
    """A result of a step that counts who waits for it."""

    waits: dict[str, int]

    def __init__(self, array):
        self.array = array

    def __int__(self):
        Counted.waits["int"] += 1
        return int(self.array)

    def __array__(self, *args, **kwargs):
        Counted.waits["array"] += 1
        return np.asarray(self.array, *args, **kwargs)

    def block_until_ready(self):
        Counted.waits["block"] += 1
        return self


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """For the count of bad steps, of the step before. The first step is waited for, and each line of the log."""

    def make_train_step(*arguments):
        step = make(*arguments)

        def counted(*arguments):
            state, metrics = step(*arguments)
            return state, jax.tree.map(Counted, metrics)

        return counted

    make = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", make_train_step)
    Counted.waits = dict.fromkeys(("int", "array", "block"), 0)
    loop.fit(task(Batches()), tmp_path, linear.section(steps=10, log_every=5, checkpoint_every=100), seed=0)
    names = ("loss", "mse", "grad_norm", "bad_steps", "bad_in_row")
    assert Counted.waits == {"int": 10, "array": 10 * len(names), "block": len(names)}


def test_the_rate_and_the_use_of_a_chip(tmp_path, monkeypatch):
    """A bad step is no update, so the rate stays. On CPUs, whose peak nobody states, no use is told."""
    rate = optax.linear_schedule(0.0, 1.2, 12)
    loop.fit(task(Batches(poison=(3,)), rate=rate), tmp_path / "cpu", linear.section(steps=4, log_every=1), seed=0)
    np.testing.assert_allclose(
        [line["learning_rate"] for line in lines(tmp_path / "cpu")], [0, 0.1, 0.1, 0.2], atol=1e-6
    )
    assert not any("utilisation" in line or "memory_gib/used" in line for line in lines(tmp_path / "cpu"))

    monkeypatch.setattr(parallel, "peak_flops", lambda: 1e6)
    monkeypatch.setattr(parallel, "memory", lambda: {"used": 2**30, "peak": 3 * 2**30})
    section = linear.section(steps=4, accumulate=2)
    loop.fit(task(Batches()), tmp_path / "chip", section, seed=0)
    state = init_state(linear.initial(), optax.adam(0.05), 0)
    strategy = parallel.strategy()
    step = loop.make_train_step(linear.loss, optax.adam(0.05), section.ema, section.accumulate, strategy)
    needed = flops(step, state, strategy.place(linear.FROZEN), strategy.split(linear.batch(8)))
    assert needed > 0
    for line in lines(tmp_path / "chip"):
        np.testing.assert_allclose(line["utilisation"], needed / line["step_seconds"] / 1e6, rtol=1e-6)
        assert (line["memory_gib/used"], line["memory_gib/peak"]) == (1, 3)


def test_each_size_of_batch_compiles_once():
    clock, called = times.Times(), []

    def step(state, frozen, batch):
        time.sleep(0 if batch["x"].shape in called else SLOW)
        called.append(batch["x"].shape)
        return state, {}

    run = times.measured(step, clock, counts_flops=False)
    for size in (1, 2):
        run(0, 0, {"x": np.zeros(size)})
    compiling = clock.seconds()["compile"]
    for size in (1, 2, 1):
        run(0, 0, {"x": np.zeros(size)})
    assert len(called) == 5 and clock.seconds()["compile"] == compiling >= 2 * SLOW


def test_the_fullest_device_is_told(monkeypatch):
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    devices = [device(bytes_in_use=3, peak_bytes_in_use=4), device(bytes_in_use=2, peak_bytes_in_use=9)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert parallel.memory() == {"used": 3, "peak": 9}
    monkeypatch.setattr(jax, "local_devices", lambda: [device()])
    assert parallel.memory() == {}


@pytest.mark.parametrize("kind", ["TPU v5 lite", "cpu"])
def test_the_peak_is_that_of_all_chips(kind, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)] * 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert parallel.peak_flops() == (8 * 197e12 if "TPU" in kind else None)


def test_records_read_and_skipped_are_counted(tmp_path):
    def read(index):
        if index % 4 == 0:
            raise BadRecord("torn")
        return {name: value[0] for name, value in linear.batch(1, index).items()}

    tally = Tally()
    source = Source("some", 32, read)
    loop.fit(
        task(lambda start: loader(source, 8, 0, start=start, tally=tally), records=tally), tmp_path, linear.section(), 0
    )
    read, skipped = ([line[f"records/{name}"] for line in lines(tmp_path)] for name in ("read", "skipped"))
    assert read == sorted(read) and all(count >= 8 * step for count, step in zip(read, range(2, 13, 2), strict=True))
    assert 0 < read[-1] / 5 < skipped[-1] < read[-1] / 2, "a quarter of the draws are bad"


def test_records_read_in_batches_are_counted():
    def read_batch(indices, draws):
        return {"x": indices}

    tally = Tally()
    source = Source("batches", 32, lambda index: {"x": index}, read_batch=read_batch)
    batches = loader(source, 4, 0, tally=tally)
    for _ in range(3):
        next(batches)
    assert tally()["read"] >= 12 and tally()["read"] % 4 == 0 and tally()["skipped"] == 0
