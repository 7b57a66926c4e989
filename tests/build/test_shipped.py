"""Configs and demo weights are found from any current folder, and trained models by the folder they are in."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import latent_cfg
from diffusion_jax import build
from diffusion_jax.app import sample
from diffusion_jax.build import fields, shipped
from diffusion_jax.build.weights import load_model, resolved
from tests import command_line
from tests.test_main import TINY


def test_files_of_the_current_folder_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find("configs/digits.py") == shipped.ROOT / "configs" / "digits.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "digits.py").touch()
    assert str(shipped.find("configs/digits.py")) == "configs/digits.py"
    assert str(shipped.find("configs/none.py")) == "configs/none.py"


def test_the_demo_is_loaded_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_model("weights/emoji")
    assert model.size == (128, 128) and model.shape == (16, 16, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((model.params, model.codec.params)))
    assert load_model("weights/emoji", (64, 0)).size == (64, 128)
    with pytest.raises(ValueError, match="height and width must be multiples of 8 pixels"):
        load_model("weights/emoji", (30, 64))


@pytest.mark.slow
def test_the_student_draws_in_one_call_what_the_demo_draws_in_twenty():
    prompts = ["a red apple, shaded", "a blue fish, outlined", "a yellow star on a blue background, flat"]

    def drawn(preset, folder, **values):
        config = latent_cfg.get_config(preset)
        config.sample.update(batch_size=3, **values)
        images = sample.generate_pictures(config, load_model(folder), prompts, range(3), config.sample.guidance)
        return np.stack(list(images)).astype(float)

    demo, student = drawn("full", "weights/emoji", steps=20), drawn("fast", "weights/fast", steps=1)
    apart = np.abs(student[:, None] - demo[None]).mean(axis=(2, 3, 4))
    assert (apart.argmin(axis=1) == range(3)).all() and apart.diagonal().max() < 0.5 * apart.mean()


def test_without_a_checkpoint_the_model_is_that_of_the_named_weights(tmp_path):
    config = latent_cfg.get_config("small")
    config.model.block_out_channels, config.data.styles = (8, 8, 8), ("flat",)
    theirs = json.loads((shipped.ROOT / config.weights / "config.json").read_text())
    config_in_use = resolved(FrozenConfigDict(config), tmp_path)
    assert (
        build.model.network(config_in_use)
        == build.model.network(fields.completed(ConfigDict(theirs)))
        != build.model.network(config)
    )
    assert config_in_use.data.size == theirs["data"]["size"]
    assert config_in_use.name == "latent_cfg" and config_in_use.data.styles == ("flat",)
    (tmp_path / "vae").mkdir()
    config.weights = str(tmp_path)  # a folder of networks alone
    assert resolved(config, tmp_path) is config
    config.weights = ""
    assert resolved(config, tmp_path) is config


def test_a_folder_without_a_model_is_one_clear_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((shipped.ROOT / "weights" / "emoji" / "config.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: run --mode=train first"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="describes no denoiser"):
        load_model("weights/emoji/vae")


@pytest.mark.parametrize("config", ["--config=configs/latent_cfg.py:foo", "--config configs/latent_cfg.py:foo"])
def test_config_files_are_found_from_any_folder(config, tmp_path, monkeypatch, capfd):
    assert command_line.run(monkeypatch, *config.split(), cwd=tmp_path) == 2
    assert "unknown preset 'foo' of latent_cfg" in capfd.readouterr().err


def test_help_shows_the_flags_and_the_examples(tmp_path):
    command = [sys.executable, "-c", "from diffusion_jax.app.command import run; run()", "--help"]
    environment = os.environ | {"PYTHONPATH": str(command_line.ROOT)}
    help_text = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True).stdout
    assert "diffusion_jax --config=configs/latent_cfg.py --mode=train" in help_text
    assert "--workdir: For checkpoints" in help_text and "--prompt: What to generate" in help_text


@pytest.mark.slow
def test_what_was_trained_and_what_was_exported_of_it_are_loaded_alike(tmp_path, monkeypatch):
    small = [*TINY, "--config.train.steps=2", f"--workdir={tmp_path}"]
    assert not command_line.run(monkeypatch, *small, "--mode=train")
    assert not command_line.run(monkeypatch, *small, "--mode=export")
    trained, exported = load_model(tmp_path), load_model(tmp_path / "export")
    assert trained.size == exported.size == (8, 8)
    assert trained.network == exported.network._replace(init=trained.network.init)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), dict(trained.params), dict(exported.params)
    )
