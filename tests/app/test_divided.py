"""Weights that are divided, by the command line: a latent model with a first stage of its own, and a LoRA of it."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from tests import command_line
from tests.test_main import TWO_STAGES, arrays, finish, start

DIVIDE = """
from diffusion_jax import parallel

parallel.SMALL = 16  # so that this small model is divided too
"""
SHORT = ["--config.autoencoder.train.steps=2", "--config.train.steps=2", "--config.train.batch_size=8"]
DIVIDED = ["--config.train.parallel=fsdp=2", "--config.autoencoder.train.parallel=fsdp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the run "divided"."""
    folder = tmp_path_factory.mktemp("divided")
    (folder / "config.py").write_text(TWO_STAGES + DIVIDE)
    run(folder, "--mode=train", "--workdir=divided", *SHORT, *DIVIDED)
    return folder


def run(folder, *flags):
    status, stderr = finish(start(*flags, base=["--config=config.py"], cwd=folder, devices=4))
    assert status == 0, stderr


def pictures(workdir):
    return np.stack([np.asarray(Image.open(file)) for file in sorted((workdir / "samples").glob("0*.png"))])


@pytest.mark.slow
def test_a_divided_run_has_the_weights_and_pictures_of_a_whole_one(folder):
    run(folder, "--mode=train", "--workdir=whole", *SHORT)
    for stage in ("", "autoencoder"):
        divided, whole = (arrays(folder / name / stage)["ema"] for name in ("divided", "whole"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), divided, whole)

    run(folder, "--mode=sample", "--workdir=divided", *SHORT, *DIVIDED)
    on_four = pictures(folder / "divided")
    command_line.succeed("--config=config.py", "--mode=sample", "--workdir=divided", *SHORT, *DIVIDED, cwd=folder)
    assert np.abs(on_four.astype(int) - pictures(folder / "divided")).max() <= 1
    sheets = [np.asarray(Image.open(folder / name / "samples" / "step_0000002.png")) for name in ("divided", "whole")]
    assert np.abs(sheets[0].astype(int) - sheets[1]).max() <= 1, "the snapshot during training"


@pytest.mark.slow
def test_a_divided_run_is_evaluated_and_exported(folder):
    copy = shutil.copytree(folder / "divided", folder / "copy")
    few = ["--config.eval.images=4", "--config.eval.steps=1", "--config.eval.terms=2", "--config.eval.batch_size=4"]
    run(folder, "--mode=eval", "--workdir=copy", *SHORT, *DIVIDED, *few)
    assert (copy / "eval" / "report.json").exists()
    command_line.succeed("--config=config.py", "--mode=export", "--workdir=copy", *SHORT, *DIVIDED, cwd=folder)
    assert (copy / "export" / "unet").exists() or list(copy.rglob("unet/diffusion_pytorch_model.safetensors"))
