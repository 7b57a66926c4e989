"""configs/transformer.py: what a U-Net of digits can do, a transformer can do by the same commands."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.build.weights import load_model
from diffusion_jax.interop import load_transformer
from tests import command_line
from tests.test_main import arrays, steps_saved

CONFIG = command_line.ROOT / "tests" / "app" / "transformers.py"


def run(preset, workdir, *flags):
    return command_line.succeed(f"--config={CONFIG}:{preset}", f"--workdir={workdir}", *flags)


def picture(workdir):
    image = np.asarray(Image.open(workdir / "samples" / "0000.png")).astype(int)
    assert image.shape == (8, 8, 3) and image.std() > 2
    return image


def output(model):
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([3.0, 400.0])
    return model.network.apply(jax.tree.map(jnp.asarray, model.params), x, t, {"label": jnp.arange(2)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    assert "denoiser: 0.0" in run("plain", folder, "--mode=train")
    return folder


@pytest.mark.slow
def test_a_run_is_sampled_exported_and_loaded(trained):
    assert "step 6, averaged" in run("plain", trained, "--mode=sample")
    drawn = picture(trained)
    run("plain", trained, "--mode=export")
    export = trained / "export"
    assert sorted(file.name for file in export.iterdir()) == ["config.json", "transformer"]
    of_run, exported = load_model(trained), load_model(export)
    assert "transformer_blocks_each" in of_run.params["params"]
    np.testing.assert_allclose(output(exported), output(of_run), atol=2e-3)  # float16
    module, single = load_transformer(export / "transformer")
    assert "transformer_blocks_1" in single["params"] and not module.scan
    run("plain", trained.parent / "of export", "--mode=sample", f"--config.weights={export}")
    assert np.abs(picture(trained.parent / "of export") - drawn).mean() < 2


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(trained, tmp_path):
    run("plain", tmp_path, "--mode=train", "--config.train.steps=3")
    assert steps_saved(tmp_path) == [3]
    run("plain", tmp_path, "--mode=train")
    again = arrays(tmp_path)
    for name, tree in arrays(trained).items():
        jax.tree.map(np.testing.assert_array_equal, again[name], tree)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["plain", "single"])
def test_another_run_starts_from_an_export(preset, trained, tmp_path):
    """Whether its blocks are compiled once or one by one."""
    shutil.copytree(trained, tmp_path / "first")
    run("plain", tmp_path / "first", "--mode=export")
    init = f"--config.init={tmp_path / 'first' / 'export' / 'transformer'}"
    slow = "--config.optimizer.learning_rate=1e-9"
    run(preset, tmp_path / "second", "--mode=train", "--config.train.steps=1", init, slow)
    np.testing.assert_allclose(output(load_model(tmp_path / "second")), output(load_model(trained)), atol=2e-3)


@pytest.mark.slow
def test_a_student_of_few_steps_is_trained_and_draws(trained, tmp_path):
    run("flow_map", tmp_path, "--mode=train", f"--config.teacher={trained}")
    assert "step 6, averaged" in run("flow_map", tmp_path, "--mode=sample", f"--config.teacher={trained}")
    picture(tmp_path)


@pytest.mark.slow
def test_a_lora_is_trained_exported_and_loaded(trained, tmp_path):
    run("lora", tmp_path, "--mode=train", f"--config.teacher={trained}")
    run("lora", tmp_path, "--mode=export", f"--config.teacher={trained}")
    assert sorted(file.name for file in (tmp_path / "export").iterdir()) == ["config.json", "lora.safetensors"]
    teacher, student, exported = (output(load_model(folder)) for folder in (trained, tmp_path, tmp_path / "export"))
    assert np.abs(student - teacher).max() > 0.01
    np.testing.assert_allclose(exported, student, atol=5e-3)
