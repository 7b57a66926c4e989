"""The headers of the configs say what --mode=check says, and its arithmetic is the compilers', for every preset."""

import json
import os
import subprocess
import sys

import pytest
from ml_collections import FrozenConfigDict

from diffusion_jax import build
from diffusion_jax.app import check, estimate
from diffusion_jax.build import agreement
from diffusion_jax.messages import size
from tests import device_flags
from tests.app import presets
from tests.command_line import ROOT

TPU_COMPILER = os.environ.get("TPU_COMPILER", "")


def stages(words, slice, workdir, monkeypatch, hours=False):
    """What a check says of the trainings of a config, without their data."""

    def no_data(*args, **options):
        raise FileNotFoundError("no data")

    monkeypatch.setattr(build.data, "source", no_data)
    config = FrozenConfigDict(presets.config_of(words))
    found = check.report(config, workdir, estimate.Options(slice, hours=hours))
    line, status = estimate.verdict(found)
    assert status == 0 and found["stages"], line
    return found["stages"]


def test_every_config_says_what_it_costs():
    assert {row.words.partition(".py")[0] for row in presets.ROWS} == presets.CONFIGS.keys()


def loads_networks(row):
    """Whether a check of the preset loads text encoders and weights, which takes most of its time."""
    return agreement.has_text_encoders(presets.config_of(row.words))


@pytest.mark.parametrize("row", [row for row in presets.ROWS if not loads_networks(row)], ids=lambda row: row.words)
def test_the_memory_in_a_header(row, tmp_path, monkeypatch):
    found = stages(row.words, row.slice, tmp_path, monkeypatch)
    assert row.memory == size(max(stage["known"] for stage in found))


@pytest.mark.slow
@pytest.mark.parametrize("row", presets.ROWS, ids=lambda row: row.words)
def test_the_memory_and_the_time_in_a_header(row, tmp_path, monkeypatch):
    found = stages(row.words, row.slice, tmp_path, monkeypatch, hours=True)
    assert row.memory == size(max(stage["known"] for stage in found))
    assert row.time == estimate.hours(sum(stage["hours"] for stage in found))


@pytest.mark.slow
@pytest.mark.parametrize("words", presets.OTHERS)
def test_the_other_presets_fit(words, tmp_path, monkeypatch):
    (row,) = (row for row in presets.ROWS if row.words == "few_step.py:shortcut")
    (stage,) = stages(words, row.slice, tmp_path, monkeypatch)
    assert stage["held"]["weights"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
    "words",
    [("digits.py", "transformer.py", "latent_cfg.py:imagenet256/S"), pytest.param((), marks=pytest.mark.documents)],
    ids=["some presets", "all presets"],
)
def test_the_arithmetic_is_the_compilers(words, platform):
    """Bytes of the arguments of a step on eight devices, under both strategies."""
    if platform == "tpu" and not TPU_COMPILER:
        pytest.skip(
            "the TPU compiler is not installed: pip install --no-deps --target FOLDER libtpu, TPU_COMPILER=FOLDER"
        )
    path = os.pathsep.join(filter(None, (TPU_COMPILER * (platform == "tpu"), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flags(8), "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.app.argument_bytes", platform, *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {preset for preset, *_ in found} == set(words or [row.words for row in presets.ROWS])
    for preset, strategy, counted, compiled in found:
        assert counted == pytest.approx(compiled, rel=0.03), (preset, strategy)
