"""--mode=check is right where the answer is known, and its arithmetic is the compiler's."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import cifar10, common, digits, latent_cfg, transformer
from configs import published as published_config
from diffusion_jax import build, chips, messages, parallel, paths
from diffusion_jax.app import account, check, estimate, planned, programs
from diffusion_jax.app.estimate import Place
from diffusion_jax.interop import save_autoencoder
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.step import init_state
from tests import command_line

TPU_COMPILER = os.environ.get("TPU_COMPILER", "")
ROOT = command_line.ROOT


def changed(config, **fields):
    """The config with other values of dotted fields, written with _ for the dot of a section: train_steps."""
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


def checked(config, workdir, topology="", **options):
    """(report, last line, exit status) of a check. By default without the FLOPs."""
    found = check.report(FrozenConfigDict(config), workdir, estimate.Options(topology, **{"hours": False} | options))
    return found, *estimate.verdict(found)


def published(name, **fields):
    return changed(published_config.get_config(), checkpoint=name, **fields)


def tiny(**fields):
    config = changed(digits.get_config(), train__steps=1000, **fields)
    config.model.block_out_channels, config.model.norm_num_groups, config.model.attention_head_dim = (8, 16), 4, 8
    return config


def saved(config, workdir, step):
    """Save a checkpoint as a training of this config would have."""
    model = build.model.diffusion_model(FrozenConfigDict(config), training=True)
    state = init_state(model.network.init(jax.random.key(0)), build.objective.optimizer(config.optimizer, 1000), 0)
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(state._replace(step=jax.numpy.int32(step)))


def test_imagenet256_fits_v5e_8(tmp_path):
    found, line, status = checked(latent_cfg.get_config("imagenet256"), tmp_path, "v5e:2x4", hours=True)
    (stage,) = found["stages"]
    assert stage["parameters"] == pytest.approx(130.5e6, rel=0.001)
    assert stage["hours"] == pytest.approx(15.6, abs=0.1), "docs/transformers.md"
    assert line.startswith("state fits: 3.1 GB of 16.0 GB a chip, and --compile says") and status == 0


def test_the_unet_of_imagenet256_fits_v5e_8(tmp_path):
    found, line, status = checked(latent_cfg.get_config("imagenet256/unet"), tmp_path, "v5e:2x4")
    first, stage = found["stages"]
    assert (first["name"], stage["name"]) == ("autoencoder", "denoiser")
    assert stage["parameters"] == pytest.approx(232e6, rel=0.005)
    assert stage["arguments"] == pytest.approx(5.60e9, abs=5e6), "as the TPU compiler says, docs/scaling.md"
    assert line.startswith("state fits: 7.5 GB of 16.0 GB a chip, and --compile says") and status == 0


@pytest.mark.parametrize("name, whole, eighth", [("sd15", "17.2", "2.2"), ("sdxl", "51.4", "6.5")])
def test_stable_diffusion_fits_v5e_8_only_if_it_is_divided(name, whole, eighth, tmp_path):
    _, line, status = checked(published(name), tmp_path, "v5e:2x4")
    assert status == 3
    assert line == (
        f"does not fit: denoiser, {whole} GB of 16.0 GB without activations; fsdp=8 needs {eighth} GB and activations; "
        f"sampling: {'fits whole' if name == 'sd15' else 'in turns'}"
    )
    _, line, status = checked(published(name, train__parallel="fsdp=8"), tmp_path, "v5e:2x4")
    assert status == 0 and line.startswith(f"state fits: {eighth} GB of 16.0 GB a chip")


@pytest.fixture(scope="module")
def klein():
    """Type of the weights -> FLUX.2 klein 4B, with shapes instead of weights."""
    return functools.cache(lambda dtype: build.model.described_model(published("klein", dtype=dtype), training=False))


@pytest.mark.parametrize(
    "topology, fields, way, need",
    [
        ("v5e:1x1", {}, "in turns", 7.75),
        ("v6e:1x1", {}, "fits whole", 14.15),
        ("v6e:1x1", {"sample__in_turns": True}, "in turns", 7.75),
        ("v5e:1x1", {"dtype": "float32"}, "does not fit", 15.5),
        ("v5e:2x4", {"dtype": "float32"}, "divided by 8", 3.83),
        ("v5e:2x4", {"train__parallel": "fsdp"}, "divided by 8", 1.91),
    ],
)
def test_how_klein_is_sampled(topology, fields, way, need, klein):
    config = FrozenConfigDict(published("klein", **{"dtype": "bfloat16"} | fields))
    found = account.sampling(config, klein(config.dtype), check.place_of(topology))
    assert found["way"] == way and found["need"] == pytest.approx(need * 1e9, rel=0.01)


def test_the_sizes_of_klein_are_the_published_ones(klein):
    turns = klein("bfloat16").turns()
    published_bytes = 2 * np.array([27 * 100_930_816 + 388_956_160, 3_875_544_576, 84_046_115])
    np.testing.assert_allclose(list(turns.values()), published_bytes, rtol=1e-4)


@pytest.mark.parametrize("name, is_turbo", [("z_image", False), ("z_image_turbo", True)])
def test_the_sizes_of_z_image_are_the_published_ones(name, is_turbo):
    model = build.model.described_model(published(name, dtype="bfloat16"), training=False)
    published_bytes = 2 * np.array([35 * 100_930_816 + 388_956_160, 6_154_908_736, 83_819_683])
    np.testing.assert_allclose(list(model.turns().values()), published_bytes, rtol=1e-4)
    assert model.has_guidance == is_turbo and model.size == (1024, 1024)


@pytest.mark.parametrize(
    "kind, count, of_host",
    [("v5e", 8, 8), ("v5e", 16, 4), ("v6e", 4, 4), ("v4", 8, 4), ("h100", 16, 8), ("v5p", 1, 1)],
)
def test_the_chips_of_a_host(kind, count, of_host):
    assert chips.of_host(kind, count) == of_host


def test_the_compiler_says_the_same_of_sd15_divided(tmp_path):
    config = published("sd15", train__parallel="fsdp", train__batch_size=32, dtype="bfloat16")
    (stage,) = checked(config, tmp_path, "v5e:2x4")[0]["stages"]
    assert stage["arguments"] == pytest.approx(1.74e9, abs=5e6), "docs/scaling.md"


def test_a_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "free_space", lambda folder: 1e6)
    _, line, status = checked(digits.get_config(), tmp_path)
    assert (line, status) == ("does not fit: disk for checkpoints, 37.4 MB of 1.0 MB", 3)


def test_a_source_slower_than_the_step(tmp_path, monkeypatch):
    source = build.data.source

    def slow(*args, **options):
        found = source(*args, **options)
        return dataclasses.replace(found, read=lambda index: time.sleep(0.01) or found.read(index))

    monkeypatch.setattr(account, "MEASURED", 40)
    monkeypatch.setattr(check, "place_of", lambda topology: Place("a fast chip", 1, 1e12, 1e15, here=True))
    monkeypatch.setattr(build.data, "source", slow)
    found, line, status = checked(tiny(), tmp_path, hours=True)
    assert status == 0 and line.endswith("on a fast chip at 40%; the source is slower than the step")
    assert found["records"]["rate"] < 100 * os.cpu_count() + 100
    assert found["hours"] == pytest.approx(1000 * 64 / found["records"]["rate"] / 3600)


def test_a_first_stage_that_is_trained_elsewhere(tmp_path):
    """Its network is enough to plan with; to train, its folder is named."""
    config = digits.get_config()
    config.autoencoder = common.trained_autoencoder(
        patch_size=(2, 2), block_out_channels=(4, 8), layers_per_block=1, latent_channels=2, norm_num_groups=2
    )
    config.model = transformer.get_config().model
    config.model.update(in_channels=8, out_channels=8, num_layers=1)
    found, _, status = checked(config, tmp_path, "v5e:1x1", hours=True)
    assert status == 0 and [stage["name"] for stage in found["stages"]] == ["denoiser"]
    assert found["notes"][-1].startswith("this config trains no first stage of its own: name the folder of a trained")
    _, line, status = checked(config, tmp_path)
    assert status == 3 and line == f"does not work: {found['notes'][-1]}"
    module = build.model.autoencoder(config)
    save_autoencoder(module, module.init(jax.random.key(0), module.example_image()), tmp_path / "vae")
    config.autoencoder.checkpoint = str(tmp_path / "vae")
    _, line, status = checked(config, tmp_path, hours=True)
    assert status == 0, line


def test_a_missing_encoder(tmp_path):
    config = changed(latent_cfg.get_config("small"), condition__encoders=(str(tmp_path / "clip"),))
    _, line, status = checked(config, tmp_path / "run")
    assert status == 3 and f"{tmp_path / 'clip'}: no such folder of a text encoder" in line


def test_a_checkpoint_of_another_model(tmp_path):
    saved(tiny(), tmp_path, step=300)
    config = tiny()
    config.model.block_out_channels = (8, 24)
    _, line, status = checked(config, tmp_path)
    assert status == 3 and line.startswith("does not work: the checkpoint in") and "does not fit this config" in line


def test_a_laptop_which_goes_on_from_its_checkpoint(tmp_path):
    saved(tiny(), tmp_path, step=300)
    found, line, status = checked(tiny(), tmp_path, hours=True)
    (stage,) = found["stages"]
    assert (stage["steps"], stage["done"], found["here"]) == (700, 300, True)
    assert status == 0 and line.startswith("state fits: ") and " on 1 x cpu at 40%" in line
    assert found["hours"] == pytest.approx(700 * max(stage["seconds"], 64 / found["records"]["rate"]) / 3600)


def test_a_work_directory_that_does_not_exist_is_not_made(tmp_path):
    assert checked(tiny(), tmp_path / "a" / "b")[2] == 0
    assert not (tmp_path / "a").exists()


def test_a_batch_that_does_not_divide(tmp_path):
    _, line, status = checked(tiny(train__batch_size=60), tmp_path, "v5e:2x4")
    assert status == 3 and "train.batch_size=60 does not divide over 8 devices" in line


def test_a_data_set_of_another_machine_is_a_note(tmp_path):
    config = changed(cifar10.get_config(), data__data_dir=str(tmp_path))
    _, line, status = checked(config, tmp_path)
    assert status == 3 and 'TFDS has not prepared "cifar10"' in line
    found, _, status = checked(config, tmp_path, "v5e:2x4")
    assert status == 0 and 'TFDS has not prepared "cifar10"' in found["notes"][0]


def test_gpus_of_another_machine(tmp_path):
    found, line, status = checked(latent_cfg.get_config("imagenet256/S"), tmp_path, "h100:8", hours=True)
    assert status == 0 and line.endswith(f"; {estimate.hours(found['hours'])} on h100-8 at 40%")
    (stage,) = found["stages"]
    assert stage["seconds"] == pytest.approx(stage["flops"] / (8 * 989e12 * 0.4))


@pytest.mark.parametrize("topology", ["v5e", "v5e:2*4", "v2:2x4", "v5e:0x4", "v5e-8"])
def test_a_slice_that_is_none(topology):
    with pytest.raises(ValueError, match=r"--topology: expected v4, v5e, .* such as v5e:2x4; got"):
        check.place_of(topology)


def test_the_arithmetic_is_the_compilers(tmp_path):
    found, line, status = checked(tiny(train__accumulate=2), tmp_path, compile=True)
    (stage,) = found["stages"]
    assert stage["arguments"] == pytest.approx(stage["compiled"]["arguments"], rel=0.03)
    assert stage["compiled"]["total"] == pytest.approx(
        sum(stage["compiled"][kind] for kind in ("arguments", "temporary", "output"))
    )
    assert stage["sampling"]["arguments"] > stage["held"]["weights"]
    assert status == 0 and line.startswith(f"fits: {messages.size(stage['compiled']['total'])} of ")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["pmap", "fsdp"])
def test_the_arithmetic_is_the_tpu_compilers(strategy, tmp_path):
    if not TPU_COMPILER:
        pytest.skip(
            "the TPU compiler is not installed: pip install --no-deps --target FOLDER libtpu, TPU_COMPILER=FOLDER"
        )
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (TPU_COMPILER, os.environ.get("PYTHONPATH"))))}
    flags = "--config=configs/digits.py --mode=check --topology=v5e:2x2 --compile --effort=O0 --nohours --json"
    command = [
        sys.executable,
        "main.py",
        *flags.split(),
        f"--workdir={tmp_path}",
        f"--config.train.parallel={strategy}",
    ]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (stage,) = json.loads(done.stdout)["stages"]
    assert ("all-gather" in stage["compiled"]["collectives"]) == (strategy == "fsdp")
    assert stage["compiled"]["arguments"] == pytest.approx(stage["arguments"], rel=0.03)


def test_a_compiled_program_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "FOLDER", tmp_path)
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    first = programs.cost(lowered, "a", "")
    monkeypatch.setattr(programs, "_compiled", lambda lowered: pytest.fail("compiled again"))
    assert programs.cost(lowered, "a", "") == first
    with pytest.raises(pytest.fail.Exception):
        programs.cost(lowered, "another compiler", "")


@pytest.mark.parametrize(
    "message, expected",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.97G) "
            "exceeds available HBM (15.75G).",
            "27.97 GiB of 15.75 GiB",
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.30G of 15.75G hbm. Exceeded hbm "
            "capacity by 1.55G.",
            "17.30 GiB of 15.75 GiB",
        ),
        ("RESOURCE_EXHAUSTED: Out of memory\nallocating", "RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_what_a_program_lacks(message, expected):
    assert programs.excess(message) == expected


def test_what_collectives_send():
    program = """
  %x = f32[8,160]{1,0} all-reduce(%y), channel_id=1
  %g = (bf16[64]{0}, bf16[512]{0}) all-gather-start(%y), channel_id=2
  %d = bf16[512]{0} all-gather-done(%g)
  %r = f32[4]{0} reduce-scatter(%y), channel_id=3"""
    assert programs.collectives(program) == {"all-reduce": 8 * 160 * 4, "all-gather": 512 * 2, "reduce-scatter": 16}


@pytest.mark.parametrize("limit", [0, 1, 7, 8, 31, 100, 200])
def test_the_largest_that_fits(limit):
    tried = []
    assert programs.largest(lambda count: tried.append(count) or count <= limit, 8, 100) == min(limit, 100)
    assert len(tried) <= 10


@pytest.mark.parametrize(
    "shape, itemsize, expected",
    [
        ((), 4, 512),
        ((200,), 4, 1024),
        ((1280,), 4, 8192),
        ((3, 3, 32, 64), 4, 9 * 32 * 128 * 4),
        ((3, 3, 64, 3), 4, 9 * 128 * 4 * 4),
        ((64, 8, 8, 3), 4, 128 * 8 * 8 * 3 * 4),
        ((128, 192), 2, 128 * 192 * 2),
        ((3, 5), 1, 512),
    ],
)
def test_a_tpu_pads_arrays(shape, itemsize, expected):
    """As the TPU compiler lays out an argument of this shape."""
    assert chips.tpu_bytes(shape, itemsize) == expected


def test_what_a_device_holds_is_its_part():
    leaves = {"kernel": jax.ShapeDtypeStruct((64, 512), "float32"), "bias": jax.ShapeDtypeStruct((512,), "float32")}
    assert parallel.bytes_held(leaves, "pmap", 8) == 4 * (64 * 512 + 512)
    assert parallel.bytes_held(leaves, "fsdp=4", 8) == 4 * (64 * 512 // 4 + 512)


def test_flops_of_a_step_do_not_depend_on_the_devices():
    config = FrozenConfigDict(tiny())
    model = build.model.diffusion_model(config, training=True)
    stage = planned.denoiser(config, model, several_captions=False)
    assert stage.flops(8) == pytest.approx(stage.flops(1), rel=0.01)


def test_the_command(tmp_path, monkeypatch):
    flags = ("--config=configs/digits.py", "--mode=check", "--nohours", f"--workdir={tmp_path}")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert command_line.run(monkeypatch, *flags, "--json") == 0
    assert json.loads(said.getvalue())["verdict"].startswith("state fits")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert command_line.run(monkeypatch, *flags, "--config.data.source=folder") == 3
    assert said.getvalue().splitlines()[-1].startswith("does not work: config.data.path is empty")
