"""Text encoders of one's own: a model with each is trained, resumed, drawn with and exported, in new processes too."""

import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from diffusion_jax import build, paths
from diffusion_jax.build import encoders, fields
from diffusion_jax.build.weights import load_model
from tests import command_line
from tests.interop.test_encoders import saved, write_tokenizer

CONFIG = """
from ml_collections.config_dict import placeholder
from configs import common, digits

def get_config(preset=""):
    config = digits.get_config()
    config.name = "letters"
    config.data = common.data("folder", size=8)
    config.condition = common.by_text(length=6)
    config.model.update(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type="UNetMidBlock2DCrossAttn", norm_num_groups=4, attention_head_dim=4, cross_attention_dim=None,
        num_class_embeds=None, class_embed_type=placeholder(str),
        projection_class_embeddings_input_dim=placeholder(int),
    )
    config.train.update(steps=2, batch_size=4, checkpoint_every=2)
    config.sample.update(prompts=("a b", "c"), steps=2, num_images=1)
    if preset == "lora":
        config.lora = common.lora()
    return config
"""
POOLED = ["--config.model.class_embed_type=projection", "--config.model.projection_class_embeddings_input_dim=12"]
CASES = {
    "clip": ["('CLIP',)"],
    "t5": ["('T5@layer=penultimate,norm=True',)", "--config.condition.null=zeros"],
    "sdxl": ["('CLIP@layer=penultimate,pooled=True', 'PROJECTED@layer=penultimate,pooled=True')", *POOLED],
    "sd3": ["('CLIP@length=5', 'T5', 'minilm@length=9')", "--config.condition.join=tokens"],
    "half": ["('UMT5', 'BERT', 'QWEN3@layer=1')", "--config.condition.dtype=bfloat16"],
}


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the config, pictures with captions, and folders of text encoders."""
    folder = tmp_path_factory.mktemp("letters")
    (folder / "letters.py").write_text(CONFIG)
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i, caption in enumerate(("a b", "c", "d e f", "a", "b", "f", "e d", "c d")):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "pictures" / f"{i}.png")
        (folder / "pictures" / f"{i}.txt").write_text(caption)
    for name, kind in {
        "CLIP": "CLIPTextModel",
        "PROJECTED": "CLIPTextModelWithProjection",
        "T5": "T5EncoderModel",
        "UMT5": "UMT5EncoderModel",
        "BERT": "BertModel",
        "QWEN3": "Qwen3Model",
    }.items():
        saved(kind, folder / name / "text_encoder")
        model = "bpe" if kind.startswith(("CLIP", "Qwen3")) else "unigram"
        template = {"CLIP": ["<s>", "$A", "</s>"], "Qwen": ["$A"]}.get(kind[:4], ["$A", "</s>"])
        write_tokenizer(folder / name / "tokenizer", model, template)
    return folder


def condition(*listed, **settings):
    """A section of config.condition."""
    return fields.section(fields.CONDITION, **{"kind": "text", "encoders": listed, "length": 6, **settings})


def flags(folder, encoders, *others, mode="train", workdir="run"):
    for name in ("CLIP", "PROJECTED", "UMT5", "T5", "BERT", "QWEN3"):
        encoders = encoders.replace(f"'{name}", f"'{folder}/{name}/text_encoder")
    base = [f"--config={folder}/letters.py", f"--mode={mode}", f"--workdir={workdir}", "--config.data.path=pictures"]
    return [*base, f"--config.condition.encoders={encoders}", *others]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_model_reads_any_text_encoder(name, folder, tmp_path):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    for steps in (2, 4):
        command_line.succeed(*flags(folder, *CASES[name], f"--config.train.steps={steps}"), cwd=tmp_path)
    command_line.succeed(*flags(folder, *CASES[name], mode="sample"), cwd=tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "run" / "samples" / "0000.png"))
    command_line.succeed(*flags(folder, *CASES[name], mode="export"), cwd=tmp_path)
    model, exported = load_model(tmp_path / "run"), load_model(tmp_path / "run" / "export")
    texts = [each.conditioning.of_prompts(["a b", "c"]) for each in (model, exported)]
    jax.tree.map(np.testing.assert_array_equal, *texts)
    assert np.abs(texts[0]["text"][0] - texts[0]["text"][1]).max() > 0 and drawn.shape == (8, 8, 3)
    assert ("text_embeds" in texts[0]) == (name == "sdxl")


@pytest.mark.slow
def test_a_moved_encoder_is_the_same_and_another_one_is_not(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "pictures", tmp_path / "pictures")
    clip = shutil.copytree(folder / "CLIP", tmp_path / "moved")
    command_line.succeed(*flags(folder, "('CLIP',)"), cwd=tmp_path)
    draw = flags(folder, f"('{clip}/text_encoder',)", mode="sample")
    command_line.succeed(*draw, cwd=tmp_path)
    for change, message in {
        "('T5',)": "is not the text encoder that this model was trained with",
        "('CLIP@layer=1',)": "the weights in run were trained with",
        "('minilm',)": "",  # whose width is another
    }.items():
        assert command_line.run(monkeypatch, *flags(folder, change, mode="sample"), cwd=tmp_path) == 2
        stderr = capsys.readouterr().err
        assert "Traceback" not in stderr and message in stderr.splitlines()[-1], stderr
    saved("CLIPTextModel", clip / "text_encoder", hidden_act="gelu")
    assert command_line.run(monkeypatch, *draw, cwd=tmp_path) == 2
    assert (
        "is not the text encoder that this model was trained with: its files have the hash" in capsys.readouterr().err
    )


def test_entries_are_read_with_their_settings(folder):
    listed = "minilm@length=9", f"{folder}/CLIP/text_encoder@pooled=True,layer=1"
    section = condition(*listed, join="tokens", length=5)
    first, second = encoders.text_encoders(section)
    assert (first.length, first.pooled, second.length, second.pooled) == (9, False, 5, True)
    pinned = encoders.pinned(section)
    assert pinned[0] == "minilm@length=9" and pinned[1].startswith(
        f"{folder}/CLIP/text_encoder@pooled=True,layer=1,sha="
    )
    again = condition(*pinned, join="tokens", length=5)
    assert encoders.pinned(again) == pinned and encoders.cache_key(again) == encoders.cache_key(section)
    assert encoders.text_encoders(again)[1].length == 5


def test_the_width_of_the_network_is_that_of_the_texts(folder):
    listed = "minilm", f"{folder}/CLIP/text_encoder"
    for join, width in {"tokens": 384, "channels": 392}.items():
        config = ConfigDict({"condition": condition(*listed, join=join)})
        assert build.model.conditioning(config).null["text"].shape[-1] == width


def test_all_that_an_embedding_depends_on_is_in_its_key(folder):
    clip, t5 = (f"{folder}/{name}/text_encoder" for name in ("CLIP", "T5"))
    changes = [
        ((clip,), {}),
        ((t5,), {}),
        ((clip,), {"length": 5}),
        ((clip,), {"pooled": True}),
        ((clip,), {"dtype": "bfloat16"}),
        ((f"{clip}@layer=1",), {}),
        ((f"{clip}@norm=False",), {}),
        ((clip, t5), {}),
        ((t5, clip), {}),
        ((clip, t5), {"join": "tokens"}),
        (("minilm",), {}),
    ]
    keys = [encoders.cache_key(condition(*listed, **settings)) for listed, settings in changes]
    assert len({*keys}) == len(changes)
    assert keys[-1] == "all-MiniLM-L6-v2-6", "by which caches of earlier versions are found"
    assert keys[2] == encoders.cache_key(condition(f"{clip}@length=5"))


def test_an_encoder_that_is_not_here_is_known_by_its_hash(folder, tmp_path):
    here = condition(f"{folder}/CLIP/text_encoder", "minilm")
    of_run = condition(*encoders.pinned(here))
    sha = of_run.encoders[0].rpartition("sha=")[2]
    for entry in (f"nowhere@sha={sha}", "nowhere"):
        (pinned, _) = encoders.pinned(condition(entry, "minilm"), of_run)
        assert pinned.endswith(f"/nowhere@sha={sha}")
        assert encoders.cache_key(condition(pinned, "minilm")) == encoders.cache_key(here)
    for entry in ("nowhere", "nowhere@layer=1"):
        with pytest.raises(FileNotFoundError, match="nowhere: no such folder of a text encoder; copy it there, or"):
            encoders.pinned(condition(entry, "minilm"), of_run if "layer" in entry else None)


def test_what_a_folder_has_beside_its_encoder_does_not_change_its_hash(folder, tmp_path):
    copy = shutil.copytree(folder / "CLIP", tmp_path / "copy")
    first = encoders.pinned(condition(f"{copy}/text_encoder"))
    (copy / "text_encoder" / "README.md").write_text("...")
    assert encoders.pinned(condition(f"{copy}/text_encoder")) == first
    settings = copy / "tokenizer" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token": "<pad>"', '"pad_token": "</s>"'))
    assert encoders.pinned(condition(f"{copy}/text_encoder")) != first


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("FOLDER@layers=1", "expected FOLDER@layer=last or penultimate or a number"),
        ("FOLDER@length=5,length=6", "got 'length=6' in '.*length=5,length=6'"),
        ("", "config.condition.encoders: expected minilm or a folder, got ''"),
        ("@length=5", "config.condition.encoders: expected minilm or a folder, got '@length=5'"),
        ("FOLDER@norm=maybe", "got 'norm=maybe' in "),
        ("FOLDER@length=long", "got 'length=long' in "),
        ("FOLDER@length=513", "length=3 to 512 tokens, .*; got 'length=513' in "),
        ("minilm@norm=True", "norm is for encoders with a final norm, and BERT has none"),
        ("minilm@sha=12", "minilm has no files to compare"),
        ("FOLDER@layer=7", "text_encoder: layer: expected last, penultimate or a number from 0 to 1, got 7"),
        ("FOLDER@sha=12", "its files have the hash "),
        ("nowhere", "nowhere: no such folder of a text encoder; copy it there, or name its place by --config"),
        ("nowhere@sha=0123456789abcdef", "nowhere: no such folder of a text encoder"),
    ],
)
def test_an_entry_that_cannot_be_read_is_one_line(entry, message, folder):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        listed = (entry.replace("FOLDER", f"{folder}/CLIP/text_encoder"),)
        encoders.text_encoders(condition(*listed))
    assert "\n" not in str(error.value)
