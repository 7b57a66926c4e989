"""configs/few_step.py: a student of a tiny model of digits, trained and drawn with."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.build.weights import load_model
from tests import command_line, test_main
from tests.test_main import TINY, arrays, finish, losses, start, steps_saved, wait_until

trained = test_main.trained  # a fixture
STUDENT = [flag for flag in TINY if "config=" not in flag and "sample.steps" not in flag and "train.steps" not in flag]


DIVIDED = """
from configs.few_step import get_config
from diffusion_jax import parallel

parallel.SMALL = 16  # so that this small model is divided too
"""


def run(method, teacher, workdir, *flags, devices=1, config="configs/few_step.py"):
    base = [f"--config={config}:digits/{method}", *STUDENT, f"--config.teacher={teacher}"]
    if devices == 1:
        return command_line.succeed(*base, *flags, f"--workdir={workdir}")
    status, stderr = finish(start(*flags, f"--workdir={workdir}", base=base, devices=devices))
    assert status == 0, stderr
    return stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["guidance", "scale", "lcm", "mean_flow", "taught_scm", "lsd"])
def test_a_student_is_trained_and_draws_in_few_steps(method, trained, tmp_path):
    fast = ["--config.optimizer.warmup=0", "--config.optimizer.learning_rate=1e-2"]
    run(method, trained, tmp_path, "--mode=train", "--config.train.steps=12", *fast)
    images = []
    for scale in (1, 4) if method == "scale" else (1,):
        flags = ["--config.sample.prompts=('3',)", "--config.sample.steps=2", f"--config.sample.guidance={scale}"]
        assert "step 12, averaged" in run(method, trained, tmp_path, "--mode=sample", *flags)
        images.append(np.asarray(Image.open(tmp_path / "samples" / "0000.png")).astype(int))
        assert images[-1].shape == (8, 8, 3) and images[-1].std() > 5
    assert len(images) == 1 or (images[0] != images[1]).any()


@pytest.mark.slow
def test_a_stopped_ladder_goes_on_as_if_it_had_not_stopped(trained, tmp_path):
    """Also its second stage, whose teacher is the student of the first."""
    first = tmp_path / "first"
    run("distillation", trained, first, "--mode=train", "--config.train.steps=6")
    flags = ["--mode=train", "--config.objective.segments=8", "--config.objective.scale=1", "--config.train.steps=12"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run("distillation", first, whole, *flags)
    base = ["--config=configs/few_step.py:digits/distillation", *STUDENT, f"--config.teacher={first}"]
    process = start(*flags, f"--workdir={parts}", base=base)
    wait_until(lambda: steps_saved(parts), process)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    run("distillation", first, parts, *flags)
    again = arrays(parts)
    for name, tree in arrays(whole).items():
        jax.tree.map(np.testing.assert_array_equal, again[name], tree)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, strategies", [("taught_mean_flow", ["pmap", "fsdp=4"]), ("lora/taught_scm", ["fsdp"])]
)
def test_a_student_of_eight_devices_is_that_of_one(method, strategies, trained, tmp_path):
    """With its teacher whole on each device and divided, to the rounding of sums over the batch, which AdamW magnifies
    where gradients are small.
    """
    (tmp_path / "divided.py").write_text(DIVIDED)
    flags = ["--mode=train", "--config.train.steps=3", "--config.train.log_every=1"]
    run(method, trained, tmp_path / "one", *flags)
    for name in strategies:
        config = {"devices": 8, "config": tmp_path / "divided.py"}
        run(method, trained, tmp_path / name, *flags, f"--config.train.parallel={name}", **config)
        np.testing.assert_allclose(*(losses(tmp_path / run) for run in ("one", name)), rtol=1e-4)
        one, eight = (arrays(tmp_path / run)["ema"] for run in ("one", name))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, eight)


@pytest.mark.slow
def test_updates_alone_make_a_student(trained, tmp_path):
    """Of low rank: trained, exported to a small file, and loaded like the run that they came from."""
    fast = ["--config.train.steps=6", "--config.optimizer.warmup=0", "--config.optimizer.learning_rate=1e-2"]
    run("lora/taught_scm", trained, tmp_path, "--mode=train", *fast)
    run("lora/taught_scm", trained, tmp_path, "--mode=export")
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == ["config.json", "lora.safetensors"]
    teacher, student, exported = (load_model(folder) for folder in (trained, tmp_path, tmp_path / "export"))
    assert student.params.keys() == {"params", "lora"}
    x, t, cond = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 400.0]), {"label": jnp.arange(2)}
    before, saved, read = (
        model.network.apply(jax.tree.map(jnp.asarray, model.params), x, t, cond)
        for model in (teacher, student, exported)
    )
    assert np.abs(saved - before).max() > 0.01
    np.testing.assert_allclose(read, saved, atol=2e-3)
