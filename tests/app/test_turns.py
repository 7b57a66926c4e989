"""Large published models: networks in turns on a device, and weights divided over devices."""

import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image

from benchmarks import random_klein
from configs import published
from diffusion_jax import build, parallel
from diffusion_jax.app import sample
from diffusion_jax.build import weights
from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.tensors import read_file, write_file
from diffusion_jax.paths import at
from diffusion_jax.serve.drawing import Artist, Picture, Shared
from diffusion_jax.stored import Stored

SIDE = 16
MARKS = {"text_encoder": (264, 32), "transformer": (32, 288), "vae": (3, 3, 32, 32)}  # shapes that no other part has


@pytest.fixture(scope="module")
def on_device():
    """() -> the parts that have arrays on the device, without the arrays of earlier tests."""
    before = jax.live_arrays()  # kept, so that no new array takes the place of one of them

    def parts():
        known = set(map(id, before))
        shapes = {array.shape for array in jax.live_arrays() if id(array) not in known}
        return {part for part, shape in MARKS.items() if shape in shapes}

    return parts


@pytest.fixture(scope="module")
def folder(tmp_path_factory, on_device):
    folder = tmp_path_factory.mktemp("klein") / "model"
    random_klein.write(folder, random_klein.TINY)
    return folder


def config_of(folder, **changed):
    config = published.get_config()
    config.checkpoint = str(folder)
    config.sample.update({"height": SIDE, "width": SIDE, "steps": 2, "guidance": 1.0, "batch_size": 2, **changed})
    return FrozenConfigDict(config)


@pytest.fixture(scope="module")
def klein(folder):
    """(its config, the model, its weights in files)."""
    config = config_of(folder, prompts=("a cat", "a dog"), num_images=2)
    return config, build.model.diffusion_model(config, (SIDE, SIDE))


def test_in_turns_only_the_network_in_use_is_on_the_device_and_the_pictures_are_the_same(klein, on_device, monkeypatch):
    config, model = klein
    request = sample.request(config, model, config.sample.prompts)
    assert on_device() == {"text_encoder"}
    model.conditioning.release()
    model, _ = weights.load(config, at("nowhere"), model)
    assert on_device() == set()
    whole = list(sample.generate(request, model, 2))

    held = []
    for module, name in ((sample.pipeline, "solve"), (sample.pipeline, "decode")):
        original = getattr(module, name)

        def noted(model, *inputs, original=original):
            held.append(on_device())
            return original(model, *inputs)

        monkeypatch.setattr(module, name, noted)
    in_turns = list(sample.generate(request, model, 2, in_turns=True))
    assert held == [{"transformer"}] * 2 + [{"vae"}] * 2
    assert on_device() == set()
    assert len(in_turns) == 4 and len({result.image.tobytes() for result in in_turns}) == 4
    for ours, theirs in zip(in_turns, whole, strict=True):
        assert ours[:2] == theirs[:2]
        np.testing.assert_array_equal(ours.image, theirs.image)


def test_the_memory_of_the_device_decides_unless_the_config_does(klein, folder, monkeypatch):
    config, model = klein
    held = model.turns()
    assert list(held) == ["text encoders", "denoiser", "autoencoder"]
    for part, count in zip(("text_encoder", "transformer", "vae"), held.values(), strict=True):
        leaves = jax.tree.leaves(load_pipeline(folder, stored=True).parts[part].params)
        assert count == pytest.approx(sum(leaf.size * 4 for leaf in leaves), abs=1000)  # and scale and shift of latents
    for room, expected in ((1.2 * sum(held.values()) / 0.8, False), (sum(held.values()), True)):
        monkeypatch.setattr(parallel, "machine", lambda room=room: parallel.Machine("a chip", 1, room))
        assert build.sampling.in_turns(config, model) == expected
        for choice in (True, False):
            assert build.sampling.in_turns(config_of(folder, in_turns=choice), model) == choice


@pytest.mark.slow
def test_a_served_picture_is_the_same_in_turns(klein, folder, on_device):
    _, model = klein
    shared = Shared("generate", (SIDE, SIDE), "published", "", steps=2, guided=False)
    pictures = [Picture(shared, "a cat", "", 1.0, seed) for seed in (0, 1)]
    drawn = []
    for in_turns in (True, False):
        artist = Artist(config_of(folder, in_turns=in_turns), model)
        drawn.append(np.asarray(artist.draw(pictures)))
        assert on_device() == (set() if in_turns else set(MARKS))
    np.testing.assert_array_equal(*drawn)


def test_reference_pictures_are_checked_without_weights(folder, tmp_path):
    def check(*shape):
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "a.png")
        config = config_of(folder, prompts=("a cat",), references=(str(tmp_path / "a.png"),))
        sample.check(config, build.model.described_model(config, sides=(SIDE, SIDE)))

    check(64, 96)
    with pytest.raises(ValueError, match="expected a reference picture of at least 64x64 pixels"):
        check(16, 96)


def test_a_folder_with_a_short_name_is_that_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "klein").symlink_to(folder)
    sizes = [build.model.described_model(config_of(name), sides=(SIDE, SIDE)).turns() for name in ("klein", folder)]
    assert sizes[0] == sizes[1]


def test_stored_weights_are_those_of_the_files(folder):
    read, stored = (load_pipeline(folder, jnp.bfloat16, stored=stored) for stored in (False, True))
    for name, part in stored.parts.items():
        assert all(isinstance(leaf, Stored) for leaf in jax.tree.leaves(part.params))
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, part.params), read.parts[name].params)


def test_a_lora_is_added_to_stored_weights(folder, tmp_path):
    name, rng = "transformer.transformer_blocks.0.attn.to_q", np.random.default_rng(0)
    halves = {f"{name}.lora_{half}.weight": rng.normal(size=s) for half, s in (("A", (2, 32)), ("B", (32, 2)))}
    write_file(tmp_path / "lora.safetensors", halves, np.float32)
    read, stored = (load_pipeline(folder, stored=stored) for stored in (False, True))
    expected, found = (merge_lora(pipeline, tmp_path / "lora.safetensors") for pipeline in (read, stored))
    before, *kernels = (
        pipeline.denoiser.params["params"]["transformer_blocks_0"]["attn"]["to_q"]["kernel"]
        for pipeline in (read, found, expected)
    )
    assert isinstance(kernels[0], Stored)
    np.testing.assert_array_equal(*map(np.asarray, kernels))
    assert np.abs(np.asarray(kernels[0]) - before).max() > 0.1


def test_a_damaged_file_is_one_line_where_it_is_read(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next((copy / "transformer").glob("*.safetensors"))
    tensors = {name: np.array(tensor) for name, tensor in read_file(file).items()}
    tensors["proj_out.weight"][0, 0] = np.nan
    write_file(file, tensors)
    pipeline = load_pipeline(copy, stored=True)
    with pytest.raises(ValueError, match=r"proj_out.weight has 1 of \d+ values that are NaN or infinite") as error:
        np.asarray(pipeline.denoiser.params["params"]["proj_out"]["kernel"])
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def script(source, devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", source], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


DIVIDED = """
import sys
import jax, numpy as np
from ml_collections import ConfigDict
from diffusion_jax import build, parallel
from diffusion_jax.app import sample
from diffusion_jax.build import weights
from diffusion_jax.paths import at
from tests.app.test_turns import SIDE, config_of

parallel.SMALL = 1000  # so that this small model is divided too
pictures = []
for strategy in ("pmap", "fsdp"):
    config = config_of(sys.argv[1], prompts=("a cat",))
    config = ConfigDict(config).copy_and_resolve_references()
    config.train.parallel = strategy
    model = build.model.diffusion_model(config, (SIDE, SIDE))
    request = sample.request(config, model, config.sample.prompts)
    texts = [array for array in jax.live_arrays() if array.shape == (264, 32)]
    held = [text.addressable_shards[0].data.size / text.size for text in texts]
    assert held == [1 / 8 if strategy == "fsdp" else 1], held
    del texts
    model.conditioning.release()
    model, _ = weights.load(config, at("nowhere"), model)
    parts = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(model.params)
             if strategy == "fsdp" and leaf.size >= 1000}
    assert parts == ({1 / 8} if strategy == "fsdp" else set()), parts
    cond, keys = request.cond, jax.vmap(jax.random.key)(np.zeros(1, np.uint32))
    if strategy == "pmap":  # a batch of one is drawn on one device
        image = sample._images(request, model, cond, keys, request.plan, request.guidance, None)
        assert len(image.devices()) == 1
        pictures.append(np.asarray(sample.to_uint8(image))[0])
    else:
        pictures += [result.image for result in sample.generate(request, model, 1)]
        whole = parallel.whole(model.params)
        assert all(leaf.sharding == own.sharding for leaf, own in zip(*map(jax.tree.leaves, (whole, model.params))))
one, divided = (picture.astype(int) for picture in pictures)
assert one.std() > 5, one.std()
assert np.abs(one - divided).max() <= 1, np.abs(one - divided).max()
"""


@pytest.mark.slow
def test_a_picture_of_divided_weights_is_that_of_one_device(folder):
    script(f"import sys; sys.argv = ['', {str(folder)!r}]\n" + DIVIDED, devices=8)


PEAK = """
import sys
import jax, pathlib
from diffusion_jax.compilation import configure
from diffusion_jax.interop import load_pipeline
from diffusion_jax.pipelines.generate import decode, noise, solve
from diffusion_jax.pipelines.published import from_published

configure()
model = from_published(load_pipeline(sys.argv[1], stored=sys.argv[2] == "True"), (16, 16))
cond = model.conditioning.of_prompts(["a cat"])
model.conditioning.release()
plan, keys = model.published_solvers["published"](1, size=model.size), jax.random.split(jax.random.key(0), 1)
jax.block_until_ready(decode(model, solve(model, noise(model, keys, plan.initial), cond, keys, plan)))
# getrusage would count the memory of the process that started this one
print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
def test_in_turns_the_peak_memory_of_a_host_is_lower_by_a_network(tmp_path):
    wide = {
        "text_encoder": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "head_dim": 64},
        "transformer": {"num_attention_heads": 16, "attention_head_dim": 64, "axes_dims_rope": (16,) * 4}
        | {"joint_attention_dim": 1536},
    }
    fields = {part: {**tiny, **wide.get(part, {})} for part, tiny in random_klein.TINY.items()}
    random_klein.write(tmp_path / "wide", fields)
    parts = load_pipeline(tmp_path / "wide", stored=True).parts.values()
    smaller = sorted(4 * sum(leaf.size for leaf in jax.tree.leaves(part.params)) for part in parts)[1]
    assert smaller > 150e6
    whole, in_turns = (
        1024 * int(script(f"import sys; sys.argv = ['', {str(tmp_path / 'wide')!r}, '{stored}']\n" + PEAK)[-1])
        for stored in (False, True)
    )
    assert whole - in_turns > 0.5 * smaller, (whole, in_turns, smaller)
