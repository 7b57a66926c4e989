"""The command line, as its users meet it: on a model of a few thousand weights and images of 8 x 8 pixels.

In processes of its own where signals, devices or the exit of a process matter, else in that of the tests.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from filelock import FileLock
from PIL import Image

from tests import command_line, device_flags
from tests.command_line import ROOT

TINY = [
    "--config=configs/digits.py",
    "--config.model.block_out_channels=(8,)",
    "--config.model.down_block_types=('AttnDownBlock2D',)",
    "--config.model.up_block_types=('AttnUpBlock2D',)",
    "--config.model.norm_num_groups=4",
    "--config.model.attention_head_dim=8",
    "--config.train.batch_size=8",
    "--config.train.steps=24",
    "--config.train.log_every=3",
    "--config.train.checkpoint_every=6",
    "--config.sample.prompts=('3', '7')",
    "--config.sample.num_images=2",
    "--config.sample.steps=3",
]


def anywhere(flags):
    """The flags with the paths of configs made absolute."""
    return [flag.replace("=configs/", f"={ROOT}/configs/") for flag in flags]


def start(*flags, base=TINY, cwd=ROOT, devices=1, **variables):
    """python main.py --config=configs/digits.py ... in a process of its own. variables: of its environment."""
    environment = (
        os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": device_flags(devices),
            "PYTHONPATH": str(ROOT),
        }
        | variables
    )
    command = [sys.executable, str(ROOT / "main.py"), *anywhere(base), *flags]
    return subprocess.Popen(command, cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process):
    """The exit status and stderr of a process."""
    _, stderr = process.communicate(timeout=600)
    return process.returncode, stderr


def steps_saved(workdir):
    return sorted(int(folder.name) for folder in (workdir / "checkpoints").glob("*") if folder.name.isdigit())


def arrays(workdir):
    """Every array of the newest checkpoint."""
    newest = workdir / "checkpoints" / str(steps_saved(workdir)[-1])
    with ocp.PyTreeCheckpointer() as reader:
        return {item: _numpy(reader, newest / item) for item in ("state", "ema")}


def _numpy(reader, folder):
    """The arrays of an item, wherever its run had them."""
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(folder).item_metadata.tree
    )
    return reader.restore(folder, restore_args=as_numpy)


def losses(workdir):
    """(step, loss) of each line of metrics.jsonl."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def wait_until(condition, process, seconds=300, pause=0.01):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(pause)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The work directory of a run that nothing disturbed: trained once for all processes of the tests, then copied."""
    folder = tmp_path_factory.getbasetemp()
    original = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "trained once"
    with FileLock(f"{original}.lock"):
        if not original.exists():
            unfinished = tmp_path_factory.mktemp("training")
            status, stderr = finish(start("--mode=train", f"--workdir={unfinished}"))
            assert status == 0, stderr
            unfinished.rename(original)
    return shutil.copytree(original, tmp_path_factory.mktemp("trained") / "run")


def sampled(workdir, *flags, devices=1):
    """The pictures that --mode=sample writes, by name."""
    flags = ["--mode=sample", f"--workdir={workdir}", *flags]
    if devices == 1:
        command_line.succeed(*TINY, *flags)
    else:
        status, stderr = finish(start(*flags, devices=devices))
        assert status == 0, stderr
    return {path.name: Image.open(path) for path in (workdir / "samples").glob("*.png") if "step" not in path.name}


def unfinished(workdir):
    """The checkpoints that are being written."""
    return [folder.name for folder in (workdir / "checkpoints").glob("*") if "tmp" in folder.name]


def train_and_kill(workdir, during_a_save, delay):
    """Train until a checkpoint is saved, or is being saved, and kill the process some seconds later."""
    before = steps_saved(workdir)
    process = start("--mode=train", f"--workdir={workdir}")

    def is_time():
        saved = unfinished(workdir) if during_a_save else steps_saved(workdir) != before
        return saved or process.poll() is not None  # on a busy machine a run may end before it is killed

    wait_until(is_time, process, pause=0.001)
    time.sleep(delay)
    process.kill()
    finish(process)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(trained, tmp_path):
    dice = random.Random(0)
    for during_a_save in (False, True):
        train_and_kill(tmp_path, during_a_save, 0 if during_a_save else dice.uniform(0, 0.5))
    status, stderr = finish(start("--mode=train", f"--workdir={tmp_path}"))
    assert status == 0, stderr
    assert steps_saved(tmp_path) == steps_saved(trained) == [18, 24] and not unfinished(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), arrays(trained))
    assert losses(tmp_path) == losses(trained)
    assert [step for step, _ in losses(tmp_path)] == [3, 6, 9, 12, 15, 18, 21, 24]


@pytest.mark.slow
@pytest.mark.parametrize("compiling", [False, True])
def test_sigterm_saves_and_exits_with_a_message_and_the_run_goes_on(compiling, trained, tmp_path):
    process = start("--mode=train", f"--workdir={tmp_path}")
    wait_until((tmp_path / "metrics.jsonl").exists if compiling else lambda: steps_saved(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    step = steps_saved(tmp_path)[-1]
    assert status == 75
    assert f"stopped by SIGTERM after step {step}" in stderr.splitlines()[-1]
    status, stderr = finish(start("--mode=train", f"--workdir={tmp_path}"))
    assert status == 0 and (step == 24 or f"going on from step {step}" in stderr), stderr
    jax.tree.map(np.testing.assert_array_equal, arrays(tmp_path), arrays(trained))


@pytest.mark.slow
def test_sigterm_before_the_first_step_leaves_nothing_to_save(tmp_path):
    process = start("--mode=train", f"--workdir={tmp_path}", "--config.train.steps=1000000")
    wait_until((tmp_path / "lock").exists, process)
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    assert status == 75 and stderr.splitlines()[-1].startswith("stopped by SIGTERM"), stderr


@pytest.mark.slow
def test_training_after_the_end_changes_nothing(trained):
    before = (trained / "metrics.jsonl").read_text(), arrays(trained)
    command_line.succeed(*TINY, "--mode=train", f"--workdir={trained}")
    assert (trained / "metrics.jsonl").read_text() == before[0]
    jax.tree.map(np.testing.assert_array_equal, arrays(trained), before[1])


@pytest.mark.slow
def test_samples_say_how_they_were_made(trained):
    # three prompts, two images of each, so the last batch is half full
    pictures = sampled(trained, "--prompt=4; 5; 6", "--config.sample.seed=10", "--config.sample.batch_size=4")
    assert sorted(pictures) == [*(f"{i:04d}.png" for i in range(6)), "grid.png"]
    for name, prompt, seed in [("0000.png", "4", "10"), ("0005.png", "6", "11"), ("grid.png", "4; 5; 6", "10")]:
        text = pictures[name].text
        assert (text["prompt"], text["seed"]) == (prompt, seed)
        assert (text["solver"], text["steps"], text["guidance"]) == ("dpmpp_2m", "3", "2.0")
        assert json.loads(text["config"])["sample"]["prompts"] == ["4", "5", "6"]
        assert str(trained) in text["weights"] and "step 24" in text["weights"]
    assert pictures["0000.png"].size == (8, 8)
    assert np.asarray(pictures["0000.png"]).std() > 0


@pytest.mark.slow
def test_the_same_seed_draws_the_same_on_eight_devices_and_in_other_batches(trained, tmp_path):
    def draw(*flags, devices=1):
        pictures = sampled(trained, *flags, devices=devices)
        return np.stack([np.asarray(pictures[f"{i:04d}.png"], int) for i in range(4)])

    one = draw()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("3\n\n7\n")
    assert np.abs(draw(devices=8) - one).max() <= 1
    assert np.abs(draw(f"--prompt=@{prompts}", "--config.sample.batch_size=3") - one).max() <= 1
    assert np.abs(draw("--config.sample.seed=1") - one).max() > 1


@pytest.mark.slow
def test_runs_name_their_own_folder(tmp_path):
    few = ["--config.train.steps=2", "--config.train.accumulate=2"]
    command_line.succeed(*anywhere(TINY), "--mode=train", *few, cwd=tmp_path)
    assert steps_saved(tmp_path / "runs" / "digits") == [2]


TWO_STAGES = """
from configs import digits, latent_cfg

def get_config():
    config = digits.get_config()
    config.data.size, config.data.upscale = 16, True
    config.autoencoder = latent_cfg.get_config().autoencoder
    config.autoencoder.checkpoint = ""
    config.autoencoder.model.update(block_out_channels=(4, 8), latent_channels=2, norm_num_groups=2)
    config.autoencoder.loss.perceptual, config.autoencoder.optimizer.decay = 0.0, "constant"
    config.autoencoder.train.update(steps=100_000, batch_size=8, checkpoint_every=3)
    config.model.update(in_channels=2, out_channels=2, block_out_channels=(8, 16), norm_num_groups=4)
    config.train.update(steps=2, batch_size=8)
    config.sample.update(prompts=("3",), steps=2, num_images=1)
    return config
"""


@pytest.mark.slow
def test_sigterm_in_the_first_stage_does_not_begin_the_second(tmp_path):
    (tmp_path / "two_stages.py").write_text(TWO_STAGES)
    base = [f"--config={tmp_path}/two_stages.py", f"--workdir={tmp_path}/run"]
    first, second = tmp_path / "run" / "autoencoder", tmp_path / "run"
    process = start("--mode=train", base=base)
    wait_until(lambda: steps_saved(first), process)
    process.send_signal(signal.SIGTERM)
    status, stderr = finish(process)
    stopped = steps_saved(first)[-1]
    assert status == 75 and f"stopped by SIGTERM after step {stopped}" in stderr.splitlines()[-1], stderr
    assert not (first / "config.json").exists() and not (second / "checkpoints").exists()

    steps = f"--config.autoencoder.train.steps={stopped + 3}"
    status, stderr = finish(start("--mode=train", steps, base=base))
    assert status == 0 and f"going on from step {stopped}" in stderr, stderr
    assert steps_saved(first)[-1] == stopped + 3 and steps_saved(second) == [2]
    command_line.succeed(*base, "--mode=sample")
    assert Image.open(second / "samples" / "0000.png").size == (16, 16)


def changed(fields):
    new = [f"--config.{field}" for field in fields.split()]
    names = {flag.partition("=")[0] for flag in new}
    return [flag for flag in TINY if flag.partition("=")[0] not in names] + new + ["--mode=train"]


def place(coordinator, processes, process):
    return [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={process}"]


BAD = {
    "--config is missing": ["--mode=train"],
    "No such file or directory: 'configs/none.py'": ["--config=configs/none.py", "--mode=train"],
    "unknown mode 'draw'; known: ": [*TINY, "--mode=draw"],
    "Unknown command line flag 'mod'": [*TINY, "--mod=train"],
    "unknown preset 'foo' of latent_cfg; known: small": ["--config=configs/latent_cfg.py:foo", "--mode=train"],
    "config.train has no field 'stepz'; known: accumulate, batch_size": changed("train.stepz=1"),
    "flag --config.train.steps=many: expected a whole number, got 'many'": changed("train.steps=many"),
    "unknown solver 'magic'; known: ": changed("sample.solver=magic"),
    "unknown schedule 'magic'; known: cosine": changed("schedule.name=magic"),
    "unknown spacing 'magic'": changed("sample.spacing=magic"),
    "unknown prediction 'magic'; known: edm, eps, flow, v, x0": changed("objective.prediction=magic"),
    "unknown loss weight 'magic'; known: ": changed("objective.weight=magic"),
    "unknown condition kind 'magic'; known: class, none, text": changed("condition.kind=magic"),
    "unknown autoencoder kind 'magic'; known: ": changed("autoencoder.kind=magic"),
    "unknown decay 'magic'; known: constant, cosine": changed("optimizer.decay=magic"),
    "unknown data source 'magic'; known: ": changed("data.source=magic"),
    'TFDS has no data set "magik"': changed("data.source=tfds:magik"),
    "has no pictures": changed("data.source=folder data.path=EMPTY"),
    "empty/*.tar'; name files and no folder": changed("data.source=tar:EMPTY/*.tar"),
    "there is no folder": changed("data.source=folder data.path=EMPTY/none"),
    "does not divide over 1 devices x 3 micro-batches": changed("train.accumulate=3"),
    "sample.prompts is empty": changed("sample.prompts=()"),
    "expected a number in 0..9, got 'cat'": [*TINY, "--mode=train", "--prompt=cat"],
    "--prompt is empty": [*TINY, "--mode=train", "--prompt= ; "],
    "No such file or directory: 'none.txt'": [*TINY, "--mode=train", "--prompt=@none.txt"],
    "no checkpoint in ": [*TINY, "--mode=sample"],
    "go together: give also --process": [*TINY, "--mode=train", "--coordinator=a:1", "--processes=2"],
    "go together: give also --coordinator, --processes": [*TINY, "--mode=train", "--process=0"],
    "expected HOST:PORT of host 0, e.g. 10.0.0.2:8476, got 'a'": [*TINY, "--mode=train", *place("a", 2, 0)],
    "expected HOST:PORT of host 0, e.g. 10.0.0.2:8476, got 'a:b'": [*TINY, "--mode=train", *place("a:b", 2, 0)],
    "got --process=2 of 2": [*TINY, "--mode=train", *place("a:1", 2, 2)],
    "got --process=0 of 0": [*TINY, "--mode=train", *place("a:1", 0, 0)],
    "--profile: expected STEP:COUNT, a first step and a number": [*TINY, "--mode=train", "--profile=x"],
    "a number of steps, as 100:5, got '0:5'": [*TINY, "--mode=train", "--profile=0:5"],
    "leave it out with --mode=sample": [*TINY, "--mode=sample", "--profile=1:2"],
    "--nodistributed is one host": [*TINY, "--mode=train", "--nodistributed", *place("a:1", 2, 0)],
    "--mode=sample runs on one host": [*TINY, "--mode=sample", "--distributed"],
    "--mode=export runs on one host": [*TINY, "--mode=export", *place("a:1", 2, 0)],
}


@pytest.mark.parametrize("expected", BAD)
def test_bad_input_is_one_clear_line_and_status_2(expected, tmp_path, capfd, monkeypatch):
    workdir = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    flags = [flag.replace("EMPTY", str(tmp_path / "empty")) for flag in BAD[expected]]
    status = command_line.run(monkeypatch, *flags, f"--workdir={workdir}")
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert expected in stderr
    assert not workdir.exists(), "what was never started leaves nothing behind"


def test_bad_input_ends_the_process_with_status_2(tmp_path):
    status, stderr = finish(start("--mode=sample", f"--workdir={tmp_path}"))
    assert status == 2
    assert stderr == f"error: no checkpoint in {tmp_path}/checkpoints: run --mode=train first, or give its --workdir\n"
    assert not list(tmp_path.iterdir())
