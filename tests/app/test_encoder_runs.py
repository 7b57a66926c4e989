"""A run with two text encoders, CLIP and T5: without them, exported with them, and as the teacher of other runs."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.build import encoders, weights
from diffusion_jax.serve import loading
from diffusion_jax.serve.drawing import Artist, Picture, Shared
from tests import command_line
from tests.app import test_encoders
from tests.app.test_divided import DIVIDE
from tests.app.test_hosts import start_two
from tests.interop.test_encoders import saved
from tests.test_main import arrays, finish, start

folder, _own_cache = test_encoders.folder, test_encoders._own_cache  # fixtures
pytestmark = pytest.mark.slow
FEW = ["--config.eval.images=4", "--config.eval.steps=1", "--config.eval.terms=2", "--config.eval.batch_size=4"]
STUDENT = [
    "--config.objective.name=consistency_distillation",
    "--config.objective.scale=2",
    "--config.objective.weight=",
    "--config.sample.solver=consistency",
    "--config.sample.guidance=1",
]


@pytest.fixture
def place(folder, tmp_path):
    """A folder with pictures and the encoders CLIP and T5, which a test may remove."""
    for name in ("pictures", "CLIP", "T5"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "letters.py", tmp_path)
    return tmp_path


def flags(*others, mode="train", workdir="run", preset="", second="T5"):
    listed = f"('CLIP/text_encoder@length=5', '{second}/text_encoder')"
    base = [f"--config=letters.py{preset}", f"--mode={mode}", f"--workdir={workdir}", "--config.data.path=pictures"]
    return [*base, f"--config.condition.encoders={listed}", "--config.condition.join=tokens", *others]


def refused(monkeypatch, capsys, *arguments, cwd):
    """The one line that a command ends with."""
    capsys.readouterr()
    assert command_line.run(monkeypatch, *arguments, cwd=cwd) == 2
    (*_, line) = stderr = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line for line in stderr) and line.startswith("error: ")
    return line


def picture(workdir):
    return np.asarray(Image.open(workdir / "samples" / "grid.png")).astype(int)


def test_a_training_whose_texts_are_in_its_cache_needs_no_encoder(place, monkeypatch, capsys):
    command_line.succeed(*flags(), cwd=place)
    shutil.copytree(place / "run", place / "other")
    longer = "--config.train.steps=4"
    with monkeypatch.context() as patch:
        patch.setattr(encoders, "text_encoder", None)  # one that is here is not loaded
        command_line.succeed(*flags(longer), cwd=place)
    shutil.rmtree(place / "T5")
    assert "T5/text_encoder is not there" in command_line.succeed(*flags(longer, workdir="other"), cwd=place)
    jax.tree.map(np.testing.assert_array_equal, arrays(place / "other"), arrays(place / "run"))
    command_line.succeed(*flags(workdir="other", mode="export"), cwd=place)

    absent = "T5/text_encoder: no such folder of a text encoder; copy it there, or name its place by --config.condition"
    for others in (
        flags("--config.train.steps=5", "--config.sample.prompts=('d',)"),
        flags(workdir="new"),
        flags(mode="sample"),
        flags("--config.condition.copy=True", mode="export"),
    ):
        assert absent in refused(monkeypatch, capsys, *others, cwd=place)

    saved("T5EncoderModel", place / "T5" / "text_encoder", layer_norm_epsilon=1e-3)
    shutil.copytree(place / "CLIP" / "tokenizer", place / "T5" / "tokenizer")
    line = refused(monkeypatch, capsys, *flags("--config.train.steps=5"), cwd=place)
    assert "T5/text_encoder is not the text encoder that this model was trained with" in line


def test_an_export_with_copies_of_its_encoders_draws_anywhere(place, tmp_path_factory):
    command_line.succeed(*flags(), cwd=place)
    command_line.succeed(*flags(mode="sample"), cwd=place)
    command_line.succeed(*flags("--config.condition.copy=True", mode="export"), cwd=place)
    elsewhere, prompts = tmp_path_factory.mktemp("elsewhere"), ["a b", "c"]
    text = weights.load_model(place / "run").conditioning.of_prompts(prompts)
    shutil.move(place / "run" / "export", elsewhere / "export")
    for name in ("CLIP", "T5"):
        shutil.rmtree(place / name)
    shutil.copy(place / "letters.py", elsewhere)
    status, stderr = finish(start(*flags("--config.weights=export", mode="sample"), base=[], cwd=elsewhere))
    assert status == 0, stderr
    assert np.abs(picture(elsewhere / "run") - picture(place / "run")).max() <= 1, "weights are in float16"
    assert np.ptp(picture(elsewhere / "run")) > 50
    assert not list((elsewhere / "export").rglob("*.partial"))
    exported = weights.load_model(elsewhere / "export").conditioning.of_prompts(prompts)
    jax.tree.map(np.testing.assert_array_equal, exported, text)
    assert np.abs(text["text"][0] - text["text"][1]).max() > 0.1


def test_a_student_and_a_lora_have_the_encoders_of_their_teacher(place, monkeypatch, capsys):
    """Which are loaded once."""
    command_line.succeed(*flags(), cwd=place)
    loaded, text_encoder = [], encoders.text_encoder
    monkeypatch.setattr(encoders, "text_encoder", lambda *args, **kw: loaded.append(args) or text_encoder(*args, **kw))
    of_teacher = ["--config.teacher=run"]
    for name, others, preset in (("student", STUDENT, ""), ("lora", [], ":lora")):
        for mode in ("train", "sample"):
            others = [*of_teacher, *others]
            command_line.succeed(*flags(*others, mode=mode, workdir=name, preset=preset), cwd=place)
            assert len(loaded) == 2, f"{mode} of {name}"
            loaded.clear()
    command_line.succeed(
        *flags(*of_teacher, "--config.condition.copy=True", mode="export", workdir="lora", preset=":lora"), cwd=place
    )
    shutil.move(place / "CLIP", place / "moved")
    command_line.succeed(*flags("--config.weights=lora/export", mode="sample", workdir="drawn"), cwd=place)
    assert np.abs(picture(place / "drawn") - picture(place / "lora")).max() <= 1, "by a config without a LoRA"
    shutil.move(place / "moved", place / "CLIP")
    for others in ([*of_teacher, *STUDENT], of_teacher):
        preset = "" if STUDENT[0] in others else ":lora"
        line = refused(monkeypatch, capsys, *flags(*others, workdir="new", preset=preset, second="CLIP"), cwd=place)
        assert "CLIP/text_encoder is not the text encoder that this model was trained with" in line


def test_a_run_is_measured_and_served(place):
    command_line.succeed(*flags(), cwd=place)
    command_line.succeed(*flags(*FEW, mode="eval"), cwd=place)
    assert (place / "run" / "eval" / "report.json").exists()
    loaded = loading.load(weights.load_config(place / "run"), place / "run")
    facts, artist = loading.facts(loaded), Artist(loaded.config, loaded.model)
    assert {"generate", "morph", "noise", "style"} == {*facts.tasks} and facts.size == (8, 8) and not facts.words
    shared = Shared("generate", (8, 8), facts.sampling["solver"], "", steps=2)
    texts = ("a b", ""), ("c d", ""), ("a b", "e f"), ("a " * 9, "")
    asked = [Picture(shared, *each, guidance=3.0, seed=0) for each in texts]
    images = np.asarray(artist.draw(asked))
    assert images.shape == (4, 8, 8, 3) and np.isfinite(images).all()
    first, *others = (np.concatenate([cond["text"] for cond in artist.conditions(each)]) for each in asked)
    assert all(np.abs(first - other).max() > 0.1 for other in others), "prompts and negative prompts count"


def test_a_divided_run_has_the_weights_of_a_whole_one(place):
    """With several captions of each picture, which are embedded in the training step."""
    (place / "letters.py").write_text(test_encoders.CONFIG + DIVIDE)
    captions = [{"file_name": f"{i}.png", "text": ["a b", "c d"]} for i in range(8)]
    (place / "pictures" / "metadata.jsonl").write_text("\n".join(map(json.dumps, captions)))
    batch = "--config.train.batch_size=8"
    command_line.succeed(*flags(batch, workdir="whole"), cwd=place)
    many = ["--config.train.parallel=fsdp", batch]
    status, stderr = finish(start(*flags(*many), base=[], cwd=place, devices=8))
    assert status == 0, stderr
    whole, divided = (arrays(place / name)["ema"] for name in ("whole", "run"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), divided, whole)


def test_two_hosts_train(place):
    for status, stderr in map(finish, start_two("run", flags=flags(), base=[], cwd=place)):
        assert status == 0, stderr
