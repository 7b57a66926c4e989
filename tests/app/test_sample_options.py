"""The options of --mode=sample from the command line: pictures from pictures, and a one-line message for each error."""

import numpy as np
import pytest
from PIL import Image

from tests import command_line
from tests.test_main import TINY

DEMO = ["--config=configs/latent_cfg.py", "--config.sample.steps=2", "--prompt=pizza"]


@pytest.fixture
def paths(tmp_path):
    """Input files, by the name that stands for them in a flag."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(tmp_path / "image.png")
    mask = np.zeros((128, 128), np.uint8)
    mask[:32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask[:64]).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "image.png").read_bytes()[:500])
    (tmp_path / "text.png").write_text("no picture")
    return {
        name: str(tmp_path / f"{name.lower()}.png") for name in ("IMAGE", "MASK", "SMALL", "BROKEN", "TEXT", "NONE")
    }


def sample(base, fields, paths, workdir, monkeypatch):
    """python main.py --mode=sample with config.sample.FIELD=VALUE."""
    flags = [f"--config.sample.{field}" for field in fields.split()]
    flags = [
        next((f"{flag[: -len(name)]}{paths[name]}" for name in paths if flag.endswith(name)), flag) for flag in flags
    ]
    return command_line.run(monkeypatch, *base, "--mode=sample", f"--workdir={workdir}", *flags)


BAD = {
    "sample.image {NONE}: not a readable picture": "image=NONE",
    "sample.image {BROKEN}: not a readable picture": "image=BROKEN",
    "sample.image {TEXT}: not a picture of a known format": "image=TEXT",
    "sample.mask {NONE}: not a readable picture": "image=IMAGE mask=NONE",
    "sample.mask is 128x64 pixels and sample.image 128x128: they must be of one size": "image=IMAGE mask=SMALL",
    "set sample.image too": "mask=MASK",
    "strength must be in [0, 1], got 1.5": "image=IMAGE strength=1.5",
    "strength must be in [0, 1], got -0.1": "image=IMAGE strength=-0.1",
    "guidance must be at least 0, got -1": "guidance=-1",
    "rescale's phi must be in [0, 1], got 2": "rescale=2",
    "must have 0 <= low < high, got 3.0 and 1.0": "guidance_interval=3.,1.",
    "the scale of CFG++ must be in [0, 1]": "cfg_pp=True",
    "the percentile of dynamic thresholding must be in [0, 1]": "dynamic_threshold=99",
    "sample.eta: the solver dpmpp_2m has none; those with it: ddim, euler_ancestral": "eta=0.5",
    "sample.order: the solver ddim has none; those with it: deis, dpm_solver, lms, unipc": "solver=ddim order=2",
    "unipc has orders 1, 2, 3, got 7": "solver=unipc order=7",
    "eta must be at least 0, got -1": "solver=ddim eta=-1",
    "resampling needs a solver of one row a step": "image=IMAGE mask=MASK resample=3",
    "it needs sample.image and sample.mask": "resample=3",
    "expected a number in 0..9, got 'cat'": "negative_prompt=cat",
}


@pytest.mark.parametrize("expected", BAD)
def test_what_cannot_be_is_one_clear_line_and_leaves_nothing_behind(expected, paths, tmp_path, capfd, monkeypatch):
    status = sample(TINY, BAD[expected], paths, tmp_path / "run", monkeypatch)
    stderr = capfd.readouterr().err
    assert status == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert expected.format(**paths) in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_part_is_made_new_and_the_picture_says_how(paths, tmp_path, monkeypatch):
    fields = "image=IMAGE mask=MASK solver=ddim eta=1.0 resample=2 negative_prompt=rocket guidance_interval=0.1,50."
    assert not sample(DEMO, fields, paths, tmp_path / "run", monkeypatch)
    picture = Image.open(tmp_path / "run" / "samples" / "0000.png")
    result, image = np.asarray(picture), np.asarray(Image.open(paths["IMAGE"]))
    np.testing.assert_array_equal(result[32:], image[32:])
    assert np.abs(result[:32].astype(int) - image[:32]).mean() > 10
    for name, text in {"solver": "ddim", "eta": "1.0", "resample": "2", "negative_prompt": "rocket"}.items():
        assert picture.text[name] == text
    assert picture.text["image"] == paths["IMAGE"] and picture.text["mask"] == paths["MASK"]
    assert picture.text["guidance_interval"] == "(0.1, 50.0)"


@pytest.mark.slow
def test_strength_0_gives_the_picture_back(paths, tmp_path, monkeypatch):
    assert not sample(DEMO, "image=IMAGE strength=0", paths, tmp_path / "run", monkeypatch)
    result = np.asarray(Image.open(tmp_path / "run" / "samples" / "0000.png"))
    np.testing.assert_array_equal(result, np.asarray(Image.open(paths["IMAGE"])))
