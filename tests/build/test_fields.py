"""A wrong number, or two numbers that do not fit together, give a one-line error before anything starts."""

import math

import jax
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import autoencoder, cifar10, digits, few_step, latent_cfg, lora, published, stable_diffusion, transformer
from diffusion_jax import build
from diffusion_jax.build import fields
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.step import init_state
from tests import command_line
from tests.test_main import TINY

DIGITS, LATENT, AUTOENCODER = (f"--config=configs/{name}.py" for name in ("digits", "latent_cfg", "autoencoder"))
TRANSFORMER = "--config=configs/transformer.py"
FEW_STEP = "--config=configs/few_step.py:digits/lcm"
CONFIGS = {
    "digits": digits.get_config,
    "cifar10": cifar10.get_config,
    "transformer": transformer.get_config,
    "transformer:emoji": lambda: transformer.get_config("emoji/parameters"),
    "autoencoder": autoencoder.get_config,
    "lora": lora.get_config,
    "published": published.get_config,
    **{
        f"few_step:{p}": lambda p=p: few_step.get_config(p) for p in ("shortcut", "digits/lcm", "lora/ect", "imf_scale")
    },
    **{
        f"latent_cfg:{p}": lambda p=p: latent_cfg.get_config(p)
        for p in (
            "small",
            "everyday",
            "full",
            "further",
            "fast",
            "coco256",
            "imagenet256",
            "imagenet256/imf",
            "imagenet256/unet",
        )
    },
}


def test_the_earlier_name_of_published_is_it():
    assert stable_diffusion.get_config is published.get_config


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_of_the_project_pass(name):
    fields.check(CONFIGS[name]())


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_and_infinity_pass_nowhere(name):
    for path in numbers(CONFIGS[name]()):
        for value in (math.nan, math.inf, -math.inf):
            config = CONFIGS[name]()
            *sections, field = path
            section = config
            for part in sections:
                section = section[part]
            with section.ignore_type():
                section[field] = value
            with pytest.raises(ValueError, match=rf"^config\.{'.'.join(path)} must be .*, got {value}$"):
                fields.check(config)


def numbers(config, path=()):
    """The paths of all numbers of a config that are in a table."""
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from numbers(value, (*path, name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*path, name)


def test_a_field_that_is_missing_is_named():
    for section, field in [("sample", "tile"), ("train", "ema"), ("schedule", "shift")]:
        config = digits.get_config()
        del config[section][field]
        with pytest.raises(ValueError, match=rf"^config\.{section} must have the field {field}, got only "):
            fields.check(config)


def test_what_a_user_adds_passes():
    config = digits.get_config()
    config.mine = ConfigDict({"steps": -1})
    config.train.mine = math.nan
    fields.check(config)


def test_a_default_is_not_shared_by_two_configs():
    first, second = digits.get_config(), digits.get_config()
    first.sample.order, first.data.splits.train = 3, "other"
    assert second.sample.order is None and second.data.splits.train == "train"


OUT_OF_RANGE = {
    "sample.batch_size must be at least 1, got 0": "sample.batch_size=0",
    "sample.batch_size must be at least 1, got -1": "sample.batch_size=-1",
    "sample.height must be 0 or in [8, 8192], got -8": "sample.height=-8",
    "sample.height must be 0 or in [8, 8192], got 4": "sample.height=4",
    "sample.width must be 0 or in [8, 8192], got 100000": "sample.width=100000",
    "sample.seed must be in [0, 4294967295], got 100000000000000000000": f"sample.seed={10**20}",
    "sample.seed must be in [0, 4294967295], got -1": "sample.seed=-1",
    "sample.seed must be at most 4294967294 for 2 images": f"sample.seed={2**32 - 1}",
    "config.seed must be in [0, 4294967295], got 4294967296": f"seed={2**32}",
    "sample.guidance_interval must be a tuple of 2, got (1.0,)": "sample.guidance_interval=(1.0,)",
    "sample.guidance_interval must be a tuple of 2, got (1.0, 2.0, 3.0)": "sample.guidance_interval=1.0,2.0,3.0",
    "sample.guidance must be a finite number, got inf": "sample.guidance=inf",
    "sample.num_images must be in [1, 1000000], got 0": "sample.num_images=0",
    "train.accumulate must be at least 1, got 0": "train.accumulate=0",
    "train.steps must be in [1, 2147483647], got -1": "train.steps=-1",
    "train.ema must be in [0, 1), got 2.0": "train.ema=2.0",
    "train.ema must be a finite number, got nan": "train.ema=nan",
    "train.log_every must be at least 1, got 0": "train.log_every=0",
    "train.checkpoint_every must be at least 1, got 0": "train.checkpoint_every=0",
    "train.snapshot_every must be at least 1, got 0": "train.snapshot_every=0",
    "optimizer.learning_rate must be above 0, got -1.0": "optimizer.learning_rate=-1.0",
    "optimizer.learning_rate must be a finite number, got nan": "optimizer.learning_rate=nan",
    "optimizer.warmup must be in [0, 2147483647], got -1": "optimizer.warmup=-1",
    "optimizer.clip must be above 0, got -1.0": "optimizer.clip=-1.0",
    "optimizer.b1 must be in [0, 1), got 2.0": "optimizer.b1=2.0",
    "objective.drop must be in [0, 1], got 2.0": "objective.drop=2.0",
    "data.size must be 0 or in [8, 8192], got -8": "data.size=-8",
    "data.size must be 0 or in [8, 8192], got 7": "data.size=7",
    "data.size must be in [8, 8192], got 0, which needs a config.checkpoint": "data.size=0",
    "data.crops must be at least 1, got 0": "data.crops=0",
    "schedule.T must be in [1, 100000], got 0": "schedule.T=0",
    "sample.steps must be in [1, 100000], got 1000000000": "sample.steps=1000000000",
    "sample.resample must be in [1, 100], got 0": "sample.resample=0",
    "model.norm_num_groups must be at least 1, got 0": "model.norm_num_groups=0",
    "model.block_out_channels must be a tuple, each at least 1, got (0, 16)": "model.block_out_channels=0,16",
    "model.attention_head_dim must be at least 1, got 0": "model.attention_head_dim=0",
    "model.layers_per_block must be at least 1, got 0": "model.layers_per_block=0",
    "eval.seed must be in [0, 4294967295], got -1": "eval.seed=-1",
}
DISAGREEING = {
    # of the model
    "config.model.in_channels must be 3": [DIGITS, "--config.model.in_channels=5"],
    "config.model.out_channels must be 4": [LATENT, "--config.model.out_channels=3", "--mode=train"],
    "config.model.cross_attention_dim must be 384": [
        LATENT,
        "--config.model.cross_attention_dim=64",
        "--mode=train",
    ],
    "config.model.num_class_embeds must be at least 13": [DIGITS, "--config.condition.num_classes=12"],
    "config.model.num_class_embeds must be None": [DIGITS, "--config.condition.kind=none"],
    "config.model.num_class_embeds must be the number of classes and one more": [
        LATENT,
        "--config.condition.kind=class",
        "--prompt=3",
        "--mode=train",
    ],
    "unknown model.kind 'mamba'; known: transformer, unet": [TRANSFORMER, "--config.model.kind=mamba"],
    "config.model.in_channels must be 3, the channels of x0, got 4": [TRANSFORMER, "--config.model.in_channels=4"],
    "config.model.num_embeds_ada_norm must be at least 12": [TRANSFORMER, "--config.condition.num_classes=12"],
    "config.model.num_embeds_ada_norm must be None": [TRANSFORMER, "--config.condition.kind=none"],
    "height and width must be multiples of 3 pixels": [TRANSFORMER, "--config.model.patch_size=3", "--mode=train"],
    "norm must be one of ('layer_norm', 'rms_norm'), got 'group_norm'": [
        TRANSFORMER,
        "--config.model.norm=group_norm",
        "--mode=train",
    ],
    "config.autoencoder must have the field checkpoint for kind=kl": [DIGITS, "--config.autoencoder.kind=kl"],
    "no first stage to train": [AUTOENCODER, "--config.autoencoder.kind=identity", "--mode=train"],
    "objective.name=shortcut needs a network with an input for the level where a step ends": [
        DIGITS,
        "--config.objective.name=shortcut",
        "--mode=train",
    ],
    "objective.name=guidance_distillation learns from a trained model": [
        DIGITS,
        "--config.objective.name=guidance_distillation",
        "--mode=train",
    ],
    "objective.name=denoising trains a network without an input for the level where a step ends": [
        FEW_STEP,
        "--config.objective.name=denoising",
        "--config.teacher=",
        "--mode=train",
    ],
    "objective.taught is for the methods that follow a path from noise to data: consistency_training, soflow": [
        "--config=configs/few_step.py:digits/shortcut",
        "--config.objective.taught=True",
        "--config.teacher=",
        "--mode=train",
    ],
    "objective.scale and model.time_cond_proj_dim are for what is learned from a guided teacher": [
        "--config=configs/few_step.py:digits/soflow",
        "--config.objective.scale=2",
        "--config.sample.guidance=1",
        "--config.teacher=",
        "--mode=train",
    ],
    "trains a network without an input for the guidance scale": [
        "--config=configs/few_step.py:digits/scale",
        "--config.objective.name=denoising",
        "--config.teacher=",
        "--mode=train",
    ],
    "learns the guidance scales from 1 to objective.scale: set objective.scale to more than 1, got 0.5": [
        "--config=configs/few_step.py:digits/scale",
        "--config.objective.scale=0.5",
        "--config.teacher=",
        "--mode=train",
    ],
    "improved_mean_flow with guidance learned from itself: set objective.drop to more than 0": [
        "--config=configs/few_step.py:digits/imf_scale",
        "--config.objective.drop=0",
        "--config.teacher=",
        "--mode=train",
    ],
    "improved_mean_flow with guidance learned from itself: set config.condition.kind to class or text": [
        "--config=configs/few_step.py:digits/imf_scale",
        "--config.condition.kind=none",
        "--config.model.num_class_embeds=None",
        "--config.teacher=",
        "--mode=train",
    ],
    "config.lora updates a trained model: set config.teacher to its folder": [
        "--config=configs/few_step.py:digits/lora/lcm",
        "--config.teacher=",
        "--mode=train",
    ],
    "config.lora updates maps that the trained model has: set config.model.target_embedding=False, got True": [
        "--config=configs/few_step.py:digits/lora/lcm",
        "--config.model.target_embedding=True",
        "--mode=train",
    ],
    "few_step has low-rank updates for guidance, lcm, ect": ["--config=configs/few_step.py:lora/shortcut"],
    "objective.name=denoising has no teacher": [DIGITS, "--config.teacher=weights/emoji", "--mode=train"],
    "config.teacher differs from the model in its shape of x0: (1, 1, 4) there, (8, 8, 3) here": [
        FEW_STEP,
        "--config.teacher=weights/emoji",
        "--mode=train",
    ],
    "this model has guidance 2 built in: set sample.guidance to 1, got 2": [FEW_STEP, "--config.sample.guidance=2"],
    "unknown preset 'fid' of few_step; known: guidance, scale, distillation": ["--config=configs/few_step.py:fid"],
    "unknown objective 'autoencoding'; known: consistency_distillation": [
        DIGITS,
        "--config.objective.name=autoencoding",
        "--mode=train",
        "--prompt=3",
    ],
    "laplace is a distribution of noise levels in training": [DIGITS, "--config.schedule.name=laplace"],
    "CFG++ needs a solver of one row a step": [
        DIGITS,
        "--config.sample.cfg_pp=True",
        "--config.sample.guidance=0.5",
        "--mode=train",
        "--prompt=3",
    ],
    "dynamic thresholding is for models of pixels": [LATENT, "--config.sample.dynamic_threshold=0.9"],
    "32 channels cannot be split into 5 groups": [DIGITS, "--config.model.norm_num_groups=5"],
    # of sizes
    "got 65 and 128; the nearest valid sizes are 64 and 128": [LATENT, "--config.sample.height=65"],
    "got 12 and 128; the nearest valid sizes are 16 and 128": [LATENT, "--config.sample.height=12"],
    "multiples of 8 pixels, got 60 and 60": [AUTOENCODER, "--config.data.size=60", "--mode=train"],
    # of the data
    "records of digits-train, got 100000": [DIGITS, "--config.train.batch_size=100000", "--mode=train"],
    "at most 8, the records of": [
        AUTOENCODER,
        "--config.data.path=CLASSES",
        "--config.autoencoder.train.batch_size=16",
        "--mode=train",
    ],
    "the model has 9 classes and digits-train has 10 classes: set config.condition.kind and": [
        DIGITS,
        "--config.condition.num_classes=9",
        "--mode=train",
        "--prompt=3",
    ],
    "needs data with captions, and": [LATENT, "--config.data.path=CLASSES", "--mode=train"],
    "config.data.path is empty": [DIGITS, "--config.data.source=folder", "--mode=train", "--prompt=3"],
    "BYTES/0.txt: expected text in UTF-8": [LATENT, "--config.data.path=BYTES", "--mode=train"],
    "METADATA/metadata.jsonl: expected text in UTF-8": [
        LATENT,
        "--config.data.path=METADATA",
        "--mode=train",
    ],
    "the model has 10 classes and CLASSES-": [DIGITS, "--config.data.path=CLASSES", "--mode=train", "--prompt=3"],
    "sample.image LONG: 1000000x1 pixels, expected sides of at most 32 to 1": [
        DIGITS,
        "--config.sample.image=LONG",
        "--prompt=3",
    ],
    # of the mode
    "--mode=export writes a denoiser": [AUTOENCODER, "--mode=export"],
    # of the command line
    "cannot be read in line 2: RuntimeError: one two": ["--config=LINES"],
    "this config has no presets": ["--config=configs/digits.py:small"],
    "--prompt: expected a file of text in UTF-8, got .": [DIGITS, "--prompt=@"],
    "got also 'foo bar'": [DIGITS, "foo", "bar"],
    "cannot be read: SyntaxError: ": ["--config=BINARY"],
    "cannot be read in line 2: NameError: name 'nope'": ["--config=NAME"],
    "must return a ConfigDict, got 3": ["--config=THREE"],
    "must have the field num_classes for kind=class, got only kind, length": ["--config=OWN"],
    "sample.prompts must be a tuple, each text that UTF-8 can encode, got ('\\udcff',)": [DIGITS, "--prompt=\udcff"],
    "expected a file of text in UTF-8, got": [DIGITS, "--prompt=@BINARY"],
    "expected a number in 0..9, got '²'": [DIGITS, "--prompt=²"],
    "expected a number in 0..9, got '٣'": [DIGITS, "--prompt=٣"],
}


@pytest.fixture
def paths(tmp_path):
    """Files by the name that stands for them in a flag."""
    contents = {
        "BINARY": bytes(range(255, -1, -1)),
        "NAME": b"def get_config():\n    return nope\n",
        "LINES": b"def get_config():\n    raise RuntimeError('one\\ntwo')\n",
        "THREE": b"def get_config():\n    return 3\n",
        "OWN": b"from configs import latent_cfg\ndef get_config():\n    config = latent_cfg.get_config()\n"
        b"    config.condition = {'kind': 'class', 'length': 16}\n    return config\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.new("L", (1_000_000, 1)).save(tmp_path / "LONG", "PNG")
    for i in range(8):
        (tmp_path / "CLASSES" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "CLASSES" / f"{i % 2}" / f"{i}.png")
    for name, file in {"BYTES": "0.txt", "METADATA": "metadata.jsonl"}.items():
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "0.png")
        (tmp_path / name / file).write_bytes(b"\xff\xfe")
    return {name: str(tmp_path / name) for name in (*contents, "LONG", "CLASSES", "METADATA", "BYTES")}


def refused(monkeypatch, capfd, workdir, *flags) -> str:
    """The one line of stderr with which the program ends, having written nothing."""
    mode = [] if any(flag.startswith("--mode=") for flag in flags) else ["--mode=sample"]
    status = command_line.run(monkeypatch, *flags, *mode, f"--workdir={workdir}")
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert not workdir.exists()
    return stderr


@pytest.mark.parametrize("expected", OUT_OF_RANGE)
def test_a_number_out_of_its_range_is_one_clear_line(expected, tmp_path, capfd, monkeypatch):
    new = f"--config.{OUT_OF_RANGE[expected]}"
    flags = [flag for flag in TINY if flag.partition("=")[0] != new.partition("=")[0]]
    assert expected in refused(monkeypatch, capfd, tmp_path / "run", *flags, new)


@pytest.mark.parametrize("expected", DISAGREEING)
def test_what_does_not_go_together_is_one_clear_line(expected, paths, tmp_path, capfd, monkeypatch):
    flags = DISAGREEING[expected]
    if any("data.path=" in flag for flag in flags):
        flags = [*flags, "--config.data.source=folder"]
    for name, path in paths.items():
        flags = [flag.replace(name, path) for flag in flags]
    line = refused(monkeypatch, capfd, tmp_path / "run", *flags)
    assert expected.replace("LONG", paths["LONG"]) in line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A work directory with a checkpoint of the smallest model."""
    workdir, config = tmp_path_factory.mktemp("run"), digits.get_config()
    config.model.update(block_out_channels=(8,), norm_num_groups=4, attention_head_dim=8)
    config.model.update(down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",))
    _, params, _ = build.objective.objective(config.objective, build.model.diffusion_model(config), jax.random.key(0))
    with Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(init_state(params, optax.sgd(0.1), 0))
    return workdir


@pytest.mark.parametrize("mode", ["train", "sample", "eval", "export"])
@pytest.mark.parametrize(
    "change, difference",
    {
        "model.block_out_channels=(16,)": "embedding: shape (11, 32) there, shape (11, 64) in",
        "model.layers_per_block=2": ": missing there, shape (",
    }.items(),
)
def test_a_checkpoint_of_another_model_is_one_clear_line(change, difference, mode, run, capfd, monkeypatch):
    before = sorted(run.rglob("*"))
    flags = [flag for flag in TINY if flag.partition("=")[0] != f"--config.{change}".partition("=")[0]]
    status = command_line.run(monkeypatch, *flags, f"--config.{change}", f"--mode={mode}", f"--workdir={run}")
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: the checkpoint in ") and stderr.count("\n") == 1, stderr
    assert "does not fit this config (params/" in stderr and difference in stderr
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("size", [(9, 9), (28, 13)])
def test_a_model_of_pixels_has_images_of_any_size(size):
    config = digits.get_config()
    build.model.diffusion_model(config, size)
    unet = build.model.network(config)
    x, t, cond = unet.example_inputs()
    x = jax.ShapeDtypeStruct((1, *size, 3), x.dtype)
    output = jax.eval_shape(unet.init_with_output, jax.random.key(0), x, t, cond)[0]
    assert output.shape == x.shape
