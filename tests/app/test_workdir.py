"""A work directory is checked to be writable before anything starts, and one training at a time locks it."""

import json

import pytest

from diffusion_jax.app.workdir import locked
from tests import command_line
from tests.test_main import TINY


def error(monkeypatch, capfd, mode, workdir) -> str:
    status = command_line.run(monkeypatch, *TINY, f"--mode={mode}", f"--workdir={workdir}")
    stderr = capfd.readouterr().err
    assert status == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    return stderr


def test_a_second_training_says_so_and_stops(tmp_path, monkeypatch, capfd):
    with locked(tmp_path):
        (tmp_path / "config.json").write_text("{}")
        assert f"another training runs in {tmp_path}" in error(monkeypatch, capfd, "train", tmp_path)
        assert json.loads((tmp_path / "config.json").read_text()) == {}
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("mode", ["train", "sample", "eval"])
@pytest.mark.parametrize("where", ["/proc/run", "FILE/run"])
def test_a_folder_that_cannot_be_written_is_one_line_before_anything_starts(mode, where, tmp_path, monkeypatch, capfd):
    (tmp_path / "FILE").touch()
    monkeypatch.setattr("diffusion_jax.build.weights.load", lambda config, workdir, model: (model, ""))
    workdir = where.replace("FILE", str(tmp_path / "FILE"))
    assert f"cannot write to {workdir}" in error(monkeypatch, capfd, mode, workdir)
