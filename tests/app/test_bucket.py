"""A run in a bucket, from its first stage to its export, by the command line."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax import paths
from diffusion_jax.build.weights import load_model
from tests import command_line
from tests.test_main import TINY, TWO_STAGES, finish, start

HOME = "home/.cache/diffusion_jax"
RUN = "gs://experiments/run"
SHORT = ["--config.autoencoder.train.steps=2", "--config.train.post_hoc", "--config.train.checkpoint_every=2"]
EVAL = [
    *("--mode=eval", "--config.eval.measures=('distances',)", "--config.eval.networks=('pixels',)"),
    *("--config.eval.images=20", "--config.eval.reference=20"),
]


@pytest.fixture
def gcs(tmp_path):
    from tests import bucket  # skips these tests without gcsfs and the emulator

    with bucket.running(tmp_path / HOME) as running:
        yield running


@pytest.mark.slow
def test_a_run_lives_in_a_bucket_from_its_first_stage_to_its_export(gcs, tmp_path):
    (tmp_path / "two_stages.py").write_text(TWO_STAGES)
    base = [f"--config={tmp_path}/two_stages.py", f"--workdir={RUN}", *SHORT]
    workdir, cache = paths.at(RUN), tmp_path / HOME / "buckets" / "experiments" / "run"

    def train(*flags) -> str:
        status, stderr = finish(start("--mode=train", *flags, base=base, cwd=tmp_path, HOME=str(tmp_path / "home")))
        assert status == 0, stderr
        return stderr

    assert f"caching in {cache / 'cache'} (config.data.cache names another folder)" in train()
    assert f"going on from step 2 of {RUN}/checkpoints" in train("--config.train.steps=4")
    assert sorted(path.name for path in workdir.iterdir()) == [
        *("autoencoder", "averages", "checkpoints", "config.json", "metrics.jsonl"),
        *("samples", "tensorboard", "times.json"),
    ]
    stage = {path.name for path in (workdir / "autoencoder").iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors", "validation.json", "metrics.jsonl"} <= stage
    assert (cache / "lock").exists() and list((cache / "cache").iterdir())

    command_line.succeed(*base, "--mode=sample", cwd=tmp_path)
    picture = Image.open(paths.fetched(workdir / "samples" / "0000.png"))
    assert picture.size == (16, 16) and f"{RUN}/checkpoints, step 4" in picture.text["weights"]

    command_line.succeed(*base, *EVAL, cwd=tmp_path)
    assert json.loads((workdir / "eval" / "report.json").read_text())["weights"].startswith(RUN)
    assert list((cache / "cache").glob("statistics-*.npz"))
    beside = ["--config.eval.averages=(0.1,)", "--config.eval.along", f"--config.eval.beside=('{RUN}',)"]
    command_line.succeed(*base, *EVAL, *beside, cwd=tmp_path)
    assert list(json.loads((workdir / "eval" / "report.json").read_text())["distances"]) == ["step 2", "step 4"]
    assert (workdir / "eval" / "step_4" / "guidance_2" / "generated.png").exists()
    assert (workdir / "eval" / "report.html").read_text().count("<section>") == 2

    command_line.succeed(*base, "--mode=export", cwd=tmp_path)
    trained, exported = load_model(RUN), load_model(f"{RUN}/export")
    for a, b in ((trained.params, exported.params), (trained.codec.params, exported.codec.params)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), dict(a), dict(b))
    assert {path.name for path in tmp_path.iterdir()} <= {"__pycache__", "home", "two_stages.py"}  # no "gs:"


@pytest.mark.parametrize(
    "field, flags",
    [
        ("config.data.path", ["--config.data.source=folder", "--config.data.path=gs://b/pictures"]),
        ("config.data.data_dir", ["--config.data.source=emoji", "--config.data.data_dir=gs://b/tfds"]),
        ("config.data.cache", ["--config.data.cache=gs://b/cache"]),
        ("--prompt", ["--prompt=@gs://b/prompts.txt"]),
        ("config.sample.image", ["--config.sample.image=gs://b/a.png"]),
    ],
)
def test_what_cannot_be_in_a_bucket_is_one_line(field, flags, tmp_path, monkeypatch, capfd):
    status = command_line.run(monkeypatch, *TINY, "--mode=train", *flags, f"--workdir={tmp_path}")
    stderr = capfd.readouterr().err
    assert status == 2 and stderr.count("\n") == 1
    assert stderr.startswith(f"error: {field}: expected a local path, got gs://b/"), stderr
