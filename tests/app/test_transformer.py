"""What a U-Net can do, a transformer can do by the same commands: configs/transformer.py, and in small the recipe of
ImageNet, in latents.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import build
from diffusion_jax.build.weights import load_model
from diffusion_jax.data.transforms import to_uint8
from diffusion_jax.interop import load_pipeline, load_transformer, save_autoencoder, save_pipeline
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.tensors import read_json
from diffusion_jax.serve import loading
from diffusion_jax.serve.drawing import Artist, Picture, Shared
from tests import command_line
from tests.app import transformers
from tests.app.test_divided import DIVIDE
from tests.interop.test_dit import our_pipeline
from tests.interop.test_pipeline import filled
from tests.test_main import arrays, finish, start, steps_saved

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


EVAL = [
    "--config.eval.measures=('likelihood', 'distances')",
    "--config.eval.networks=('pixels',)",
    *(f"--config.eval.{name}" for name in ("images=20", "reference=20", "batch_size=20", "steps=1")),
]


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    """The folder of a trained run, beside that of its autoencoder, "vae"."""
    folder = tmp_path_factory.mktemp("latent")
    module = build.model.autoencoder(transformers.get_config("latent"))
    variables = module.init(jax.random.key(0), module.example_image())
    statistics = {"running_mean": jnp.linspace(-1.0, 1.0, 8), "running_var": jnp.linspace(0.01, 0.1, 8)}
    save_autoencoder(module, {"params": variables["params"] | {"bn": statistics}}, folder / "vae")
    run("latent", folder / "run", "--mode=train", first_stage(folder))
    return folder / "run"


def first_stage(folder):
    return f"--config.autoencoder.checkpoint={folder / 'vae'}"


def latent_output(model):
    x, t = jax.random.normal(jax.random.key(0), (2, *model.shape)), jnp.array([3.0, 400.0])
    return model.network.apply(jax.tree.map(jnp.asarray, model.params), x, t, {"label": jnp.arange(2)})


@pytest.mark.slow
def test_a_run_in_latents_is_sampled_served_exported_and_loaded(latent):
    assert "step 6, averaged" in run("latent", latent, "--mode=sample", first_stage(latent.parent))
    drawn = picture(latent)

    config = transformers.get_config("latent")
    config.autoencoder.checkpoint = str(latent.parent / "vae")
    loaded = loading.load(config, latent)
    assert "flow_heun" in loading.facts(loaded).solvers
    served = Artist(loaded.config, loaded.model).draw(
        [Picture(Shared("generate", (8, 8), "flow_heun", "", 3), "3", "", 2.9, 0)]
    )
    assert np.abs(np.asarray(to_uint8(served))[0].astype(int) - drawn).max() <= 1

    run("latent", latent, "--mode=export", first_stage(latent.parent))
    export = latent / "export"
    assert read_json(export / "vae" / "config.json")["_class_name"] == "AutoencoderKLFlux2"
    of_run, exported = load_model(latent), load_model(export)
    np.testing.assert_allclose(latent_output(exported), latent_output(of_run), atol=2e-3)  # float16
    np.testing.assert_allclose(exported.codec.stats["scale"], of_run.codec.stats["scale"], rtol=1e-3)


@pytest.mark.slow
def test_a_run_in_latents_goes_on_as_if_it_had_not_stopped(latent, tmp_path):
    for steps in (3, 6):
        run("latent", tmp_path, "--mode=train", f"--config.train.steps={steps}", first_stage(latent.parent))
    again = arrays(tmp_path)
    for name, tree in arrays(latent).items():
        jax.tree.map(np.testing.assert_array_equal, again[name], tree)


@pytest.mark.slow
def test_a_run_in_latents_is_evaluated(latent):
    run("latent", latent, "--mode=eval", first_stage(latent.parent), *EVAL)
    assert read_json(latent / "eval" / "report.json")


@pytest.mark.slow
def test_a_divided_run_in_latents_has_the_weights_of_a_whole_one(latent, tmp_path):
    (tmp_path / "config.py").write_text("from tests.app.transformers import get_config\n" + DIVIDE)
    flags = ["--mode=train", "--workdir=divided", first_stage(latent.parent), "--config.train.parallel=fsdp=2"]
    status, stderr = finish(start(*flags, base=["--config=config.py:latent"], cwd=tmp_path, devices=2))
    assert status == 0, stderr
    divided, whole = (arrays(folder)["ema"] for folder in (tmp_path / "divided", latent))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), divided, whole)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """The folder of a published DiT of ten classes."""
    pipeline = our_pipeline(index={})
    module = pipeline.denoiser.module.clone(num_embeds_ada_norm=10)
    folder = tmp_path_factory.mktemp("dit")
    save_pipeline(pipeline.with_denoiser(filled(module, *module.example_inputs(), dtype=np.float32)), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", ["published", "lora"])
def test_a_published_dit_is_trained_exported_and_loaded(config, dit, tmp_path):
    """Its blocks compiled once; whole, and by low-rank updates."""
    flags = [
        *(f"--config=configs/{config}.py", f"--config.checkpoint={dit}", "--config.scan=True", f"--workdir={tmp_path}"),
        *("--config.data.source=digits", "--config.data.size=16", "--config.optimizer.warmup=0"),
        *("--config.train.steps=2", "--config.train.batch_size=4", "--config.optimizer.learning_rate=1e-2"),
        *("--config.sample.prompts=('3',)", "--config.sample.steps=2", "--config.sample.num_images=1"),
    ]
    for mode in ("train", "sample", "export"):
        command_line.succeed(*flags, f"--mode={mode}")
    assert np.asarray(Image.open(tmp_path / "samples" / "0000.png")).shape == (16, 16, 3)
    export = tmp_path / "export"
    before = load_pipeline(dit)
    after = load_pipeline(export) if config != "lora" else merge_lora(before, export / "lora.safetensors")
    assert after.denoiser.module == before.denoiser.module
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), before.denoiser.params, after.denoiser.params)
    moved = [change for change in jax.tree.leaves(changes) if change > 1e-3]
    assert len(moved) >= 2 if config == "lora" else len(moved) > len(jax.tree.leaves(changes)) / 2
