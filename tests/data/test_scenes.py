"""Scenes: what is asked for is painted, what is held out is never trained on."""

import itertools

import numpy as np
import pytest

from diffusion_jax.data import scenes
from diffusion_jax.data.captions import ARTICLES, caption, paraphrases, words_for
from diffusion_jax.data.colours import COLOURS, MainHue, named, to_lab
from diffusion_jax.data.scenes import Drawing, Scene, is_held_out, is_trained_on, paint


def disc(name="ball", style="flat", colour=(40, 90, 220)):
    """A disc on a transparent ground, a drawing of one hue."""
    y, x = np.mgrid[:64, :64]
    image = np.zeros((64, 64, 4), np.uint8)
    image[(y - 32) ** 2 + (x - 32) ** 2 < 20**2] = (*colour, 255)
    return Drawing(name, (name, "round thing"), style, MainHue(to_lab(np.array(colour) / 255), 1.0), lambda: image)


def ink(picture, ground=(255, 255, 255)):
    """The rows and columns that differ from the ground."""
    differs = np.abs(picture.astype(int) - ground).max(axis=-1) > 30
    return np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("word", "part"), scenes.SIZES.items())
def test_sizes(word, part, size):
    rows, columns = ink(paint(Scene("ball", "flat", size=word), disc(), size))
    assert len(rows) == pytest.approx(part * size, abs=2) and len(columns) == pytest.approx(part * size, abs=2)


@pytest.mark.parametrize("place", scenes.PLACES)
def test_places(place):
    rows, columns = ink(paint(Scene("ball", "flat", size="small", place=place), disc(), 64))
    for axis, (low, high) in ((rows, ("at the top", "at the bottom")), (columns, ("on the left", "on the right"))):
        middle = (axis[0] + axis[-1]) / 2
        if low.split()[-1] in place.split():
            assert middle < 20
        elif high.split()[-1] in place.split():
            assert middle > 44
        else:
            assert middle == pytest.approx(32, abs=2)


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_and_grounds(colour):
    ground = "blue" if colour != "blue" else "red"
    picture = paint(Scene("ball", "flat", colour, ground), disc(), 64)
    np.testing.assert_allclose(picture[32, 32], COLOURS[colour], atol=4)
    np.testing.assert_allclose(picture[0, 0], COLOURS[ground], atol=1)


def test_a_scene_depends_on_its_number_alone():
    drawings = [disc(f"thing {i}", style) for i in range(50) for style in ("flat", "line")]
    first, again = (scenes.trained_scene(drawings, np.random.default_rng([0, 7]))[0] for _ in range(2))
    assert first == again != scenes.trained_scene(drawings, np.random.default_rng([0, 8]))[0]


def test_what_is_held_out_is_never_trained_on_and_the_rest_is():
    drawings = [disc(f"thing {i}", style) for i in range(200) for style in ("flat", "line")]
    rng = np.random.default_rng(0)
    made = [scenes.trained_scene(drawings, rng)[0] for _ in range(3000)]
    assert all(map(is_trained_on, made))
    held = {scene.name for scene in (scenes.held_out_scene(drawings, rng)[0] for _ in range(100))}
    assert held and not held & {scene.name for scene in made}
    names = [f"thing {i}" for i in range(2000)]
    assert np.mean([is_held_out(name) for name in names]) == pytest.approx(0.05, abs=0.015)
    pairs = [is_held_out(colour, name) for colour, name in itertools.product(COLOURS, names)]
    assert np.mean(pairs) == pytest.approx(0.1, abs=0.01)


def test_nothing_is_hidden_on_its_ground():
    drawings = [disc(style=style, colour=colour) for style in ("flat", "outlined") for colour in COLOURS.values()]
    rng = np.random.default_rng(0)
    for _ in range(300):
        drawing = drawings[rng.integers(len(drawings))]
        made = scenes.scene(drawing, rng)
        ground = COLOURS[made.ground] if made.ground else (255, 255, 255)
        if made.ground:
            picture = paint(made, drawing, 64)
            own = to_lab(picture[tuple(axis[len(axis) // 2] for axis in ink(picture, ground))] / 255)
            assert np.linalg.norm(own - to_lab(named(made.ground))) > 0.08, made


def test_captions_name_what_is_seen():
    scene, rng = Scene("hot beverage", "flat", "purple", "orange", "small", "at the top"), np.random.default_rng(0)
    words = words_for("hot beverage", ("coffee",))
    made = {caption(scene, words, rng) for _ in range(200)}
    assert len(made) > 30
    for text in made:
        assert "small purple" in text and "at the top on an orange background" in text
        assert any(word in text for word in words)
        assert "a orange" not in text and "  " not in text
    assert any("flat" in text for text in made) and not all("flat" in text for text in made)


def test_a_caption_of_two_colours_is_refused():
    scene, rng = Scene("red heart", "flat", "blue"), np.random.default_rng(0)
    with pytest.raises(ValueError, match="expected one colour in a caption, got blue and red"):
        caption(scene, ("red heart",), rng)
    assert "blue love heart" in caption(scene, ("red heart", "love heart"), rng)


def test_paraphrases_are_plain():
    table = paraphrases()
    phrases = [phrase for several in table.values() for phrase in several]
    assert len(table) > 1500 and all(2 <= len(several) <= 5 for several in table.values())
    assert len(set(phrases)) == len(phrases)
    assert all(phrase == phrase.strip() and 0 < len(phrase) <= 45 for phrase in phrases)
    assert all(not phrase.startswith(ARTICLES) for name in table for phrase in words_for(name, ()))
