"""The command lines of the project's documents are understood, and the cheap ones of README.md run."""

import importlib.util
import itertools
import re
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from diffusion_jax.app import command
from diffusion_jax.build import fields
from diffusion_jax.build.flags import parse_flags
from tests import command_line
from tests.command_line import ROOT
from tests.documents import DOCUMENTS, commands, flags_of


def understand(monkeypatch, arguments):
    """Parse and check flags as the program does before it starts anything."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with flagsaver.flagsaver():
        parse_flags(sys.argv)
        assert flags.FLAGS.mode in (None, *command.MODES)
        fields.check(flags.FLAGS.config)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_command_lines_are_understood(document, monkeypatch):
    for words in commands(document):
        if flags_of(words):
            understand(monkeypatch, flags_of(words))
        for before, word in itertools.pairwise(words):
            if before == "-m":
                assert importlib.util.find_spec(word), words
            if before.endswith("python") and word.endswith(".py"):
                assert (ROOT / word).exists(), words


CONFIGS = sorted(set(re.findall(r"`(configs/\w+\.py(?::\w+)?)`", (ROOT / "README.md").read_text())))


@pytest.mark.parametrize("config", CONFIGS)
def test_configs_of_the_readme_exist(config, monkeypatch):
    understand(monkeypatch, [f"--config={config}"])


def test_assets_are_those_of_the_requirements():
    listed = [line for line in (ROOT / "requirements-assets.txt").read_text().splitlines() if not line.startswith("#")]
    assert " ".join(listed) in (ROOT / "BUILD.md").read_text()


DRAWN = [
    arguments
    for arguments in map(flags_of, commands("README.md"))
    if "--mode=sample" in arguments and any("latent_cfg" in word for word in arguments)
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", DRAWN, ids=lambda arguments: " ".join(arguments[2:]))
def test_pictures_of_the_readme_are_drawn(arguments, tmp_path, monkeypatch):
    face = np.full((64, 64, 3), 255, np.uint8)
    face[16:48, 16:48] = 255, 200, 0
    Image.fromarray(face).save(tmp_path / "face.png")
    Image.fromarray(np.repeat(np.uint8([0, 255]), 32)[:, None].repeat(64, axis=1)).save(tmp_path / "mask.png")
    few = [] if any("sample.steps" in word for word in arguments) else ["--config.sample.steps=5"]
    assert not command_line.run(monkeypatch, *arguments, *few, cwd=tmp_path)
    assert list(tmp_path.glob("runs/*/samples/0000.png"))
