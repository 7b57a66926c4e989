"""configs/published.py and configs/lora.py, as their users meet them: on a checkpoint of tiny networks."""

import itertools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.app import train
from diffusion_jax.interop import load_pipeline, load_tokenizer, save_pipeline
from diffusion_jax.interop.lora import merge_lora, save_lora
from diffusion_jax.interop.names import to_torch
from diffusion_jax.interop.tensors import read_json, write_file, write_json
from diffusion_jax.models import lora
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.vision.vision import ImageEncoder
from diffusion_jax.objectives.denoising import drop_condition
from tests import command_line
from tests.interop import test_pipeline
from tests.interop.test_pipeline import filled, our_pipeline, vocabulary  # noqa: F401  (a fixture)

TRAIN = [
    "--mode=train",
    "--config.train.steps=6",
    "--config.train.batch_size=4",
    "--config.train.log_every=3",
    "--config.optimizer.learning_rate=0.02",
    "--config.optimizer.warmup=1",
    "--config.sample.steps=2",
]


@pytest.fixture(scope="module")
def checkpoint(vocabulary, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("checkpoint")
    save_pipeline(our_pipeline(tokenizers=(load_tokenizer(vocabulary),)), folder)
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of noise with captions, some of them long."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("the cat " * (1 + i % 3))
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch, capsys):
    """python main.py --config=configs/NAME.py --config.checkpoint=… with flags -> its stderr."""

    def call(name, *flags, status=0):
        required = [f"--config=configs/{name}.py", f"--config.checkpoint={checkpoint}", f"--workdir={tmp_path}/{name}"]
        ended = command_line.run(monkeypatch, *required, *flags)
        stderr = capsys.readouterr().err
        assert ended == status, stderr
        return stderr

    return call


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted((folder / "samples").glob("[0-9]*.png"))]


def test_prompts_become_pictures_of_the_size_asked_for(run, tmp_path):
    flags = ["--mode=sample", "--config.sample.steps=3", "--config.sample.height=12", "--config.sample.guidance=60"]
    run("stable_diffusion", *flags, "--prompt=a (cat:1.3) and a very much longer prompt; a cat")
    first = pictures(tmp_path / "stable_diffusion")
    assert [picture.shape for picture in first] == [(12, 8, 3)] * 2
    run("stable_diffusion", *flags, "--prompt=a cat", "--config.sample.negative_prompt=a (dog:1.2) that is long")
    (other,) = pictures(tmp_path / "stable_diffusion")
    assert other.shape == (12, 8, 3) and np.any(other != first[1])


@pytest.mark.slow
def test_learned_words_are_drawn_by_name(run, tmp_path):
    draw = ["--mode=sample", "--config.sample.steps=2", "--config.sample.guidance=60", "--prompt=a (toy:1.2)"]
    run("stable_diffusion", *draw)
    (before,) = pictures(tmp_path / "stable_diffusion")
    write_file(tmp_path / "x.safetensors", {"emb_params": np.float32(20 * np.eye(2, 8))})
    run("stable_diffusion", *draw, f"--config.embeddings=('{tmp_path}/x.safetensors@toy',)")
    (after,) = pictures(tmp_path / "stable_diffusion")
    assert np.any(before != after)


def flagging_everything(folder):
    """Write a random safety checker to which every image shows what must not be shown."""
    encoder = ImageEncoder(8, 8, 6, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7)
    shapes = {
        name: getattr(encoder, name) for name in ImageEncoder.__dataclass_fields__ if name not in ("parent", "name")
    }
    config = {"architectures": ["StableDiffusionSafetyChecker"], "projection_dim": 6, "vision_config": shapes}
    tensors = to_torch(encoder.init(jax.random.key(0), *encoder.example_inputs()))
    tensors = {re.sub("^vision_model", "vision_model.vision_model", name): tensor for name, tensor in tensors.items()}
    for name, count in {"concept_embeds": 17, "special_care_embeds": 3}.items():
        tensors |= {name: np.ones((count, 6), np.float32), f"{name}_weights": np.full(count, -2, np.float32)}
    write_file(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", config)


def test_pictures_that_the_safety_checker_flags_are_held_back(run, checkpoint, tmp_path, caplog):
    folder = shutil.copytree(checkpoint, tmp_path / "checked")
    index = read_json(folder / "model_index.json")
    write_json(
        folder / "model_index.json", index | {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    )
    draw = [f"--config.checkpoint={folder}", "--mode=sample", "--config.sample.steps=2", "--prompt=the cat"]
    assert "safety_checker/config.json: no such file" in (missing := run("stable_diffusion", *draw, status=2))
    assert missing.count("\n") == 1 and "set safety_checker=False" in missing
    (folder / "safety_checker").mkdir()
    flagging_everything(folder / "safety_checker")
    run("stable_diffusion", *draw)
    assert "holds back the picture of 'the cat', seed 0" in caplog.text
    assert np.max(pictures(tmp_path / "stable_diffusion")) == 0
    run("stable_diffusion", *draw, "--config.safety_checker=False")
    assert np.max(pictures(tmp_path / "stable_diffusion")) > 0


@pytest.mark.slow
def test_fine_tuning_changes_what_is_drawn_and_exports_a_pipeline(run, checkpoint, photographs, tmp_path):
    draw = ["--mode=sample", "--config.sample.steps=3", "--prompt=the cat"]
    run("stable_diffusion", *draw)
    before = pictures(tmp_path / "stable_diffusion")
    run("stable_diffusion", *TRAIN, f"--config.data.path={photographs}")
    run("stable_diffusion", *draw)
    tuned = pictures(tmp_path / "stable_diffusion")
    assert np.any(tuned[0] != before[0])
    updates = lora.init(load_pipeline(checkpoint).denoiser.params, 1, jax.random.key(0))
    save_lora(tmp_path / "style.safetensors", updates, 1.0)
    adding = f"--config.loras=('{tmp_path}/style.safetensors',)"
    assert "were trained with none; for others run --mode=export" in run("stable_diffusion", *draw, adding, status=2)
    run("stable_diffusion", "--mode=export")
    first, exported = load_pipeline(checkpoint), load_pipeline(tmp_path / "stable_diffusion" / "export")
    assert exported.denoiser.module == first.denoiser.module and exported.prediction == first.prediction
    kernels = [pipeline.denoiser.params["params"]["conv_in"]["kernel"] for pipeline in (first, exported)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4
    run(
        "stable_diffusion",
        *draw,
        adding,
        f"--config.checkpoint={tmp_path}/stable_diffusion/export",
        f"--workdir={tmp_path}/again",
    )
    np.testing.assert_array_equal(pictures(tmp_path / "again"), tuned)  # stored as they are


@pytest.mark.slow
def test_fine_tuning_of_sdxl_tells_the_network_true_sizes(run, vocabulary, tmp_path, monkeypatch):  # noqa: F811
    """Also of a large JPEG, which is decoded in part, and where text and vector are dropped."""
    tasks, tokenizer = [], load_tokenizer(vocabulary)
    save_pipeline(test_pipeline.our_wide_pipeline((tokenizer, tokenizer)), tmp_path / "wide")
    (tmp_path / "photos").mkdir()
    for name, (height, width) in {"1.png": (11, 9), "2.png": (9, 17), "3.jpg": (40, 48), "4.png": (8, 8)}.items():
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "photos" / name)
        (tmp_path / "photos" / name).with_suffix(".txt").write_text("the cat")
    monkeypatch.setattr(train, "fit", lambda task, *others: tasks.append(task))
    run("stable_diffusion", *TRAIN, f"--config.checkpoint={tmp_path}/wide", f"--config.data.path={tmp_path}/photos")
    (task,), told = tasks, set()
    for batch in itertools.islice(task.batches(0), 10):
        time_ids = batch["cond"]["time_ids"]
        assert time_ids.dtype == np.float32
        told.update(map(tuple, time_ids.astype(int).tolist()))
    # the picture of 17 x 9 is resized to 15 x 8, so its centre begins at 3, or mirrored at 4
    lefts = {(9, 17, 0, 3, 8, 8), (9, 17, 0, 4, 8, 8)}
    assert told == {(11, 9, 1, 0, 8, 8), (40, 48, 0, 1, 8, 8), (8, 8, 0, 0, 8, 8)} | lefts
    dropped = drop_condition(batch["cond"], task.frozen["null_cond"], 1.0, jax.random.split(jax.random.key(0), 4))
    np.testing.assert_array_equal(dropped["time_ids"], time_ids)
    assert np.any(dropped["text"] != batch["cond"]["text"]) and (dropped["text"] == dropped["text"][:1]).all()
    on_device = jax.tree.map(jnp.asarray, batch)
    loss, _ = jax.jit(task.loss)(task.params, task.frozen, on_device, jax.random.split(jax.random.key(0), 4))
    assert np.isfinite(loss)


@pytest.mark.slow
def test_pictures_of_three_shapes_are_trained_in_three_sizes(run, vocabulary, tmp_path, monkeypatch):  # noqa: F811
    """Each step in one of them, as often as its pictures say, and the network is told which; also of a resumed run."""
    tasks, tokenizer = [], load_tokenizer(vocabulary)
    save_pipeline(test_pipeline.our_wide_pipeline((tokenizer, tokenizer)), tmp_path / "wide")
    (tmp_path / "photos").mkdir()
    for number in range(16):
        height, width = [(16, 16), (10, 30), (16, 17), (33, 12)][number % 4]
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text("the cat")

    monkeypatch.setattr(train, "fit", lambda task, *others: tasks.append(task))
    flags = [f"--config.checkpoint={tmp_path}/wide", f"--config.data.path={tmp_path}/photos"]
    run("stable_diffusion", *TRAIN, *flags, "--config.data.buckets=1")
    batches = [batch["latent"] for batch in itertools.islice(tasks[0].batches(0), 8)]
    for latent, batch in zip(batches[3:], tasks[0].batches(3), strict=False):
        np.testing.assert_array_equal(latent, batch["latent"])
        assert (batch["cond"]["time_ids"][:, 4:] == 2 * np.array(latent.shape[1:3])).all()
    for four in (batches[:4], batches[4:]):  # half of the pictures are squares
        assert sorted(latent.shape[1:3] for latent in four) == [(2, 6), (4, 4), (4, 4), (6, 2)]


@pytest.mark.slow
def test_a_lora_is_trained_drawn_with_and_exported(run, checkpoint, photographs, tmp_path):
    draw = ["--mode=sample", "--config.sample.steps=3", "--prompt=the cat"]
    run("lora", *TRAIN, f"--config.data.path={photographs}")
    run("lora", *draw)
    run("lora", "--mode=export")
    file = tmp_path / "lora" / "export" / "lora.safetensors"
    run("stable_diffusion", *draw, f"--config.loras=('{file}@1.0',)")
    ours, merged = pictures(tmp_path / "lora"), pictures(tmp_path / "stable_diffusion")
    np.testing.assert_allclose(np.int32(ours), np.int32(merged), atol=1)
    plain, updated = load_pipeline(checkpoint), merge_lora(load_pipeline(checkpoint), file)
    query = "down_blocks_0", "attentions_0", "transformer_blocks_0", "attn2", "to_q", "kernel"
    kernels = []
    for pipeline in (plain, updated):
        leaf = pipeline.denoiser.params["params"]
        for part in query:
            leaf = leaf[part]
        kernels.append(leaf)
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


@pytest.mark.slow
def test_a_lora_learns_to_draw_in_few_steps(run, photographs, tmp_path):
    """Latent consistency: the checkpoint with guidance is the teacher, convolutions are updated too."""
    method = ["--config.objective.name=consistency_distillation", "--config.objective.scale=7.5"]
    method += ["--config.sample.guidance=1"]
    targets = r"--config.lora.targets=to_[qkv]|to_out_0|proj_in|conv[12]?|conv_shortcut|time_emb_proj"
    run("lora", *TRAIN, *method, targets, f"--config.data.path={photographs}")
    draw = ["--mode=sample", "--config.sample.solver=consistency", "--config.sample.steps=2", "--prompt=the cat"]
    run("lora", *draw, *method, targets)
    assert np.std(pictures(tmp_path / "lora")) > 1
    run("lora", "--mode=export", *method, targets)
    run(
        "stable_diffusion",
        *draw,
        "--config.sample.guidance=1",
        f"--config.loras=('{tmp_path}/lora/export/lora.safetensors',)",
    )
    ours, merged = pictures(tmp_path / "lora"), pictures(tmp_path / "stable_diffusion")
    np.testing.assert_allclose(np.int32(ours), np.int32(merged), atol=1)


def test_an_inpainting_model_needs_its_image_and_mask(run, vocabulary, tmp_path):  # noqa: F811
    unet = UNet(**test_pipeline.UNET | {"in_channels": 9})
    model = our_pipeline({"unet": filled(unet, *unet.example_inputs())}, tokenizers=(load_tokenizer(vocabulary),))
    save_pipeline(model, tmp_path / "filling")
    flags = [f"--config.checkpoint={tmp_path}/filling", "--mode=sample", "--config.sample.steps=2", "--prompt=a cat"]
    assert "this is an inpainting model" in run("stable_diffusion", *flags, status=2)
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[:4] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    run(
        "stable_diffusion",
        *flags,
        f"--config.sample.image={tmp_path}/image.png",
        f"--config.sample.mask={tmp_path}/mask.png",
    )
    (result,) = pictures(tmp_path / "stable_diffusion")
    np.testing.assert_array_equal(result[4:], image[4:])
    assert np.any(result[:4] != image[:4])
    train = [*TRAIN, f"--config.checkpoint={tmp_path}/filling", f"--config.data.path={tmp_path}"]
    assert "cannot be fine-tuned here" in run("stable_diffusion", *train, status=2)


BAD = {
    "config.checkpoint is empty: name a diffusers folder": ["--config.checkpoint="],
    "nowhere: no such file or folder": ["--config.checkpoint=nowhere"],
    "height and width must be multiples of 2 pixels, got 13 and 8": ["--config.sample.height=13"],
    "tile must be a multiple of 8 pixels, or 0 for none, got 3": ["--config.sample.tile=3"],
    "expected FILE or FILE@SCALE with a finite number, got 'x@y'": ["--config.loras=('x@y',)"],
    "expected FILE or FILE@SCALE with a finite number, got 'x@nan'": ["--config.loras=('x@nan',)"],
    "nowhere.safetensors: no such file": ["--config.embeddings=('nowhere.safetensors@word',)"],
    "clip_skip: expected 0 to 1, got 2": ["--config.clip_skip=2"],
    "prompt: AND combines several prompts in web interfaces": ["--prompt=a cat AND a dog"],
    "prompt: <lora:x:1> names a file, which prompts cannot load": ["--config.sample.negative_prompt=<lora:x:1>"],
    "unknown dtype 'float8'; known: bfloat16, float32": ["--config.dtype=float8"],
    "steps must be in 1..1000": ["--config.sample.steps=1001"],
    "prediction: expected one of eps, v, x0 or flow, got 'w'": ["--config.prediction=w"],
    "no presets, got 'xl'": ["--config=configs/published.py:xl"],
}


def test_what_cannot_be_trained_is_one_clear_line(run, photographs):
    train = [*TRAIN, f"--config.data.path={photographs}"]
    for flag, message in {
        "--config.lora.targets=((": "config.lora.targets must be a regular expression (missing )",
        "--config.lora.targets=nothing": "no map of the network matches 'nothing'",
        "--config.lora.rank=1000000": "config.lora.rank must be in [1, 4096], got 1000000",
        "--config.train.batch_size=100": "train.batch_size must be at most 8, the records of",
        "--config.sample.dynamic_threshold=0.9": "dynamic thresholding is for models of pixels",
    }.items():
        stderr = run("lora", *train, flag, status=2)
        assert message in stderr.splitlines()[-1] and "Traceback" not in stderr


def test_weights_are_hashed_for_a_cache_alone(run, photographs, monkeypatch):
    """Which takes seconds for each gigabyte: neither sampling nor evaluation reads the hash."""
    hashed = []
    for module in ("codec", "pipelines.published"):
        monkeypatch.setattr(f"diffusion_jax.{module}.fingerprint", lambda tree: hashed.append(1) or "hash")
    run("stable_diffusion", "--mode=sample", "--config.sample.steps=1", "--prompt=the cat")
    assert not hashed
    run("stable_diffusion", *TRAIN, f"--config.data.path={photographs}", "--config.train.steps=1")
    assert len(hashed) == 2


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_be_is_one_clear_line(message, run):
    stderr = run("stable_diffusion", "--mode=sample", *BAD[message], status=2)
    assert message in stderr.splitlines()[-1] and "Traceback" not in stderr
