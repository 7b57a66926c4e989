"""Every command in the documents runs, in its quick form (quick_forms.py), from a fresh clone of the last commit."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.lora import save_lora
from diffusion_jax.models import lora
from tests import quick_forms

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "BUILD.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?ms)^```[^\n]*\n(.*?)^```|(?<=\n\n)((?: {4}[^\n]*\n|\n(?= {4}))+)")  # fenced, indented
NO_COMMANDS = "FROM python", "d  = memory", "8   main.py"  # how a container file, formulas and a drawing begin
STAND_INS = "FOLDER", "PHOTOS", "face.png", "mask.png", "style.safetensors"
SHELL = f"""
command_not_found_handle() {{ "{sys.executable}" "{quick_forms.__file__}" "$@" || kill $$; }}
cd() {{ :; }}
PATH=/nowhere
"""
HURRY = {  # two cores are shared by two commands
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "OMP_NUM_THREADS": "1",
}


def shell_blocks():
    """{"docs/results.md:8": commands}, for each block of commands."""
    blocks = {}
    for document in DOCUMENTS:
        text = document.read_text()
        for block in BLOCK.finditer(text):
            commands = textwrap.dedent(block[1] or block[2])
            if not commands.startswith(NO_COMMANDS) and not is_python(commands):
                line = text.count("\n", 0, block.start()) + 1
                blocks[f"{document.relative_to(ROOT)}:{line}"] = commands
    return blocks


def is_python(text):
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


BLOCKS = shell_blocks()


def done(command, folder, **environment):
    """Run a command -> (succeeded, output)."""
    made = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return made.returncode == 0, made.stdout


def quick_forms_of(commands, folder):
    """Let bash read a block of commands -> (whether each has a quick form, output).

    It writes the quick forms to FOLDER/commands and what is skipped to FOLDER/skipped.
    """
    script = SHELL + commands.replace(".venv/bin/", "")
    files = {"QUICK_FORMS": str(folder / "commands"), "QUICK_FORMS_SKIPPED": str(folder / "skipped")}
    return done(["bash", "-c", script], folder, **files)


@pytest.mark.parametrize("place", BLOCKS)
def test_every_command_has_a_quick_form(place, tmp_path):
    succeeded, output = quick_forms_of(BLOCKS[place], tmp_path)
    assert succeeded, f"{place}: {output}"


def test_every_test_that_the_table_of_faults_names_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    written = set(
        re.findall(r"(?m)^def (test_\w+)", "".join(file.read_text() for file in (ROOT / "tests").rglob("*.py")))
    )
    assert len(named) > 15 and named <= written


def test_a_command_without_a_quick_form_is_named(tmp_path):
    succeeded, output = quick_forms_of("pip install x && make docs\npip install y\n", tmp_path)
    assert not succeeded and "no quick form for: make docs\nAdd what makes it end in seconds to QUICK" in output
    assert "install y" not in (tmp_path / "skipped").read_text()


def clone(folder):
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    return folder


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """{name in the documents: a file or folder that may stand for it}."""
    folder = tmp_path_factory.mktemp("stand_ins")
    make = [sys.executable, "-m", "benchmarks.small_pipeline", folder, "--quick"]
    subprocess.run(make, cwd=ROOT, env=os.environ | HURRY, check=True)
    shutil.copy(folder / "drawings" / "grinning_cat.png", folder / "face.png")
    Image.fromarray(np.uint8(255) * np.eye(64, dtype=np.uint8)).save(folder / "mask.png")
    updates = lora.init(load_pipeline(folder / "model").denoiser.params, 1, jax.random.key(0))
    save_lora(folder / "style.safetensors", updates, 1.0)
    files = folder / "model", folder / "drawings", *(folder / name for name in STAND_INS[2:])
    return dict(zip(STAND_INS, map(str, files), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=() if "README" in place else pytest.mark.documents) for place in BLOCKS]
)
def test_every_command_runs_from_a_fresh_clone(place, tmp_path, request, subtests):
    commands = re.sub("/tmp/|/mnt/disk/", f"{tmp_path}/", BLOCKS[place])
    if any(name in commands for name in STAND_INS):
        for name, file in request.getfixturevalue("stand_ins").items():
            commands = commands.replace(name, file)
    succeeded, output = quick_forms_of(commands, tmp_path)
    assert succeeded, f"{place}: {output}"
    if (tmp_path / "commands").exists():
        run_all = [sys.executable, quick_forms.__file__, "--run-all", tmp_path / "commands"]
        succeeded, output = done(run_all, clone(tmp_path / "clone"), **HURRY)
        assert succeeded, f"{place}: {output}"
    log = tmp_path / "skipped"
    for line in log.read_text().splitlines() if log.exists() else ():
        reason, command = line.split("\t")
        with subtests.test(command):
            pytest.skip(f"{command}: {reason}")
