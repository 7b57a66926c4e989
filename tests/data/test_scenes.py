"""Scenes: what is asked for is painted, what is held out is never trained on."""

import itertools

import numpy as np
import pytest
from scipy import ndimage

from diffusion_jax.data import scenes
from diffusion_jax.data.captions import ARTICLES, caption, everyday_words, paraphrases, with_article, words_for
from diffusion_jax.data.colours import COLOURS, MainHue, rgb_of, to_lab
from diffusion_jax.data.concepts import concept_lists
from diffusion_jax.data.plurals import is_countable, plural
from diffusion_jax.data.scenes import Drawing, Other, Scene, is_held_out, is_trained_on, paint


def disc(name="ball", style="flat", colour=(40, 90, 220)):
    """A disc on a transparent ground, a drawing of one hue."""
    y, x = np.mgrid[:64, :64]
    image = np.zeros((64, 64, 4), np.uint8)
    image[(y - 32) ** 2 + (x - 32) ** 2 < 20**2] = (*colour, 255)
    lab = to_lab(np.array(colour) / 255)
    return Drawing(name, (name, "round thing"), style, MainHue(lab, 1.0), lab, lambda: image)


def ink(picture, ground=(255, 255, 255)):
    """The rows and columns that differ from the ground."""
    differs = np.abs(picture.astype(int) - ground).max(axis=-1) > 30
    return np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("word", "part"), scenes.SIZES.items())
def test_sizes(word, part, size):
    rows, columns = ink(paint(Scene(disc(), size=word), size))
    assert len(rows) == pytest.approx(part * size, abs=2) and len(columns) == pytest.approx(part * size, abs=2)


@pytest.mark.parametrize("place", scenes.PLACES)
def test_places(place):
    rows, columns = ink(paint(Scene(disc(), size="small", place=place), 64))
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
    picture = paint(Scene(disc(), colour, ground), 64)
    np.testing.assert_allclose(picture[32, 32], COLOURS[colour], atol=4)
    np.testing.assert_allclose(picture[0, 0], COLOURS[ground], atol=1)


@pytest.mark.parametrize(("size", "count"), itertools.product(("", "small"), scenes.LAYOUTS))
def test_counts(size, count):
    differs = np.abs(paint(Scene(disc(), size=size, count=count), 128).astype(int) - 255).max(axis=-1) > 30
    assert ndimage.label(differs)[1] == count


@pytest.mark.parametrize("relation", scenes.RELATIONS)
@pytest.mark.parametrize(("first", "second"), [("red", ""), ("", "green")])
def test_two_drawings(relation, first, second):
    scene = Scene(disc(), first, "yellow", other=Other(relation, disc("cube"), second))
    picture = paint(scene, 64)
    middles = {}
    for which, colour in (("first", first or "blue"), ("second", second or "blue")):
        close = np.linalg.norm(to_lab(picture / 255) - to_lab(rgb_of(colour)), axis=-1) < 0.1
        middles[which] = np.argwhere(close).mean(axis=0)[0 if relation in ("above", "below") else 1]
    assert (middles["first"] < middles["second"]) == (relation in ("and", "next to", "to the left of", "above"))


def things(count):
    return [disc(f"thing {i}", style) for i in range(count) for style in ("flat", "line")]


def test_a_scene_depends_on_its_number_alone():
    drawings = things(50)
    first, again, another = (scenes.trained_scene(drawings, np.random.default_rng([0, i])) for i in (7, 7, 8))
    assert first == again != another


def test_what_is_held_out_is_never_trained_on_and_the_rest_is():
    drawings, rng = things(200), np.random.default_rng(0)
    samples = [scenes.trained_scene(drawings, rng) for _ in range(3000)]
    assert all(map(is_trained_on, samples))
    trained_names = {part.drawing.name for scene in samples for part in (scene, scene.other) if part}
    held = {scene.drawing.name for scene in (scenes.held_out_scene(drawings, rng) for _ in range(100))}
    assert held and not held & trained_names
    names = [f"thing {i}" for i in range(2000)]
    assert np.mean([is_held_out(name) for name in names]) == pytest.approx(0.05, abs=0.015)
    pairs = [is_held_out(colour, name) for colour, name in itertools.product(COLOURS, names)]
    assert np.mean(pairs) == pytest.approx(0.1, abs=0.01)


def test_every_kind_of_scene_is_made():
    drawings, rng = [disc(name) for name in ("ball", "cube", "cup of tea")], np.random.default_rng(0)
    samples = [scenes.scene(drawings, rng) for _ in range(2000)]
    assert {scene.count for scene in samples} == {1, *scenes.LAYOUTS}
    assert all(scene.drawing.name != "cup of tea" for scene in samples if scene.count > 1)  # no plural here
    others = [scene.other for scene in samples if scene.other]
    assert {other.relation for other in others} == set(scenes.RELATIONS)
    assert all(scene.drawing.name != scene.other.drawing.name for scene in samples if scene.other)
    assert all(not scene.place for scene in samples if scene.other or scene.count > 1)
    assert len(others) / len(samples) == pytest.approx(scenes.P_PAIR, abs=0.05)
    assert all(scene.size == "small" for scene in samples if scene.place)
    assert np.mean([bool(scene.place) for scene in samples]) == pytest.approx(scenes.P_PLACE, abs=0.05)


def test_nothing_is_hidden_on_its_ground():
    hued = [rgb for name, rgb in COLOURS.items() if name not in ("black", "white", "grey")]
    drawings = [disc(style=style, colour=colour) for style in ("flat", "outlined") for colour in hued]
    rng = np.random.default_rng(0)
    samples = [scenes.scene(drawings, rng) for _ in range(300)]
    samples += [alone for drawing in drawings for alone in scenes.scenes_alone(drawing)]
    for scene in samples:
        if scene.drawing.style == "outlined" and not scene.ground:
            continue  # an outline shows on paper; this test's discs have none
        ground = COLOURS[scene.ground] if scene.ground else (255, 255, 255)
        picture = paint(scene, 64)
        painted = np.abs(picture.astype(int) - ground).max(axis=-1) > 0
        ink_colour = np.median(picture[ndimage.binary_erosion(painted, iterations=4)], axis=0)
        assert np.linalg.norm(to_lab(ink_colour / 255) - to_lab(np.array(ground) / 255)) > 0.08, scene


def test_white_on_white_gets_a_ground_unless_it_has_outlines():
    alone = {(drawing.style, scene.colour): scene for drawing in (disc(style="flat"), disc(style="outlined"))
             for scene in scenes.scenes_alone(drawing)}  # fmt: skip
    assert alone["flat", "white"].ground == "blue"
    assert not alone["outlined", "white"].ground and not alone["flat", "red"].ground


def test_what_shows_is_the_colour_of_the_ink_not_of_a_tusk():
    grey = disc(style="shaded", colour=(150, 150, 150))
    cream = MainHue(to_lab(np.array([0.98, 0.97, 0.92])), 0.02)
    assert scenes.usual_ground(grey._replace(hue=cream)) == ""
    white = disc(style="shaded", colour=(250, 250, 250))._replace(hue=MainHue(to_lab(np.array([0.9, 0.2, 0.2])), 0.02))
    assert scenes.usual_ground(white) == "blue" and "red" in scenes.grounds_of(white)


def test_half_of_the_captions_leave_the_usual_ground_of_white_things_out():
    rng, swan = np.random.default_rng(0), disc("swan", "shaded", (250, 250, 250))
    share = lambda scene, **kind: np.mean(["blue background" in caption(scene, rng, **kind) for _ in range(300)])  # noqa: E731
    assert share(Scene(swan, ground="blue")) == pytest.approx(0.5, abs=0.1)
    assert share(Scene(swan, ground="blue"), styled=True) == 0
    red = disc("swan", "shaded", (220, 30, 30))
    assert share(Scene(red, ground="blue")) == share(Scene(red, ground="blue"), styled=True) == 1
    assert share(Scene(swan, ground="blue", other=Other("and", red, ""))) == 1


def test_captions_name_what_is_seen():
    drink = disc("hot beverage")._replace(words=words_for("hot beverage", ("coffee",)))
    scene, rng = Scene(drink, "purple", "orange", "small", "at the top"), np.random.default_rng(0)
    captions = {caption(scene, rng) for _ in range(200)}
    assert len(captions) > 30
    for text in captions:
        assert "small purple" in text and "at the top on an orange background" in text
        assert any(word in text for word in drink.words)
        assert "a orange" not in text and "  " not in text
    assert all("flat" in text for text in captions)
    outlined = [caption(Scene(drink._replace(style="outlined")), rng) for _ in range(200)]
    assert np.mean(["outline" in text for text in outlined]) == pytest.approx(0.5, abs=0.12)


def test_things_have_their_everyday_words():
    assert words_for("hot beverage", ("coffee",))[:4] == ("cup", "mug", "cup of coffee", "hot beverage")
    assert set(everyday_words()) <= set(concept_lists()["everyday"])
    words = [word for several in everyday_words().values() for word in several]
    assert len(set(words)) == len(words)  # a word means one thing


def test_a_thing_has_no_word_that_first_means_another():
    assert "rabbit" in words_for("rabbit", ()) and "rabbit" not in words_for("rabbit face", ("rabbit", "bunny"))
    assert "phone" not in words_for("telephone", ("phone",)) and "phone" in words_for("mobile phone", ())
    everyday = concept_lists()["everyday"]
    first = {name: words_for(name, ())[0] for name in everyday}
    assert len(set(first.values())) == len(everyday)
    said = [word for name in everyday for word in words_for(name, tuple(first.values()))]
    assert all(said.count(word) == 1 for word in ("cup", "chair", "bus", "pear", "horse", "elephant", "sheep", "apple"))


def test_everyday_things_are_held_out_in_pairs_alone():
    everyday = concept_lists()["everyday"]
    assert not any(map(is_held_out, everyday))
    assert any(is_held_out("flat", name) for name in everyday)


def test_captions_of_several_and_of_two():
    rng = np.random.default_rng(0)
    fox = disc()._replace(words=("fox", "fox on the run"))
    several = {caption(Scene(fox, "blue", count=3, size="small"), rng) for _ in range(40)}
    assert all("three small blue foxes" in text and " a three" not in text for text in several)
    pair = Scene(fox, "red", "black", other=Other("to the left of", disc("egg"), ""))
    two = {caption(pair, rng) for _ in range(40)}
    assert any(text.startswith("a red fox to the left of an egg on a black background") for text in two)
    assert all("to the left of" in text and "red fox" in text for text in two)
    with pytest.raises(ValueError, match="expected one drawing of tea, which has no plural here; got 2"):
        caption(Scene(disc("tea")._replace(words=("cup of tea",)), count=2), rng)


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("red apple", "red apples"),
        ("bus stop", "bus stops"),
        ("fairy", "fairies"),
        ("monkey", "monkeys"),
        ("box", "boxes"),
        ("plain fish", "plain fish"),
        ("policewoman", "policewomen"),
        ("sandwich", "sandwiches"),
    ],
)
def test_plurals(one, several):
    assert is_countable(one) and plural(one) == several


@pytest.mark.parametrize("phrase", ["cup of tea", "scissors", "woman running", "flag: Japan", "OK hand"])
def test_what_has_no_plural_here(phrase):
    assert not is_countable(phrase)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("french fries", "french fries"),
        ("two slices of bread", "two slices of bread"),
        ("owl with big eyes", "an owl with big eyes"),
        ("bald eagle spreading its wings", "a bald eagle spreading its wings"),
        ("bus", "a bus"),
        ("dress", "a dress"),
        ("lens", "a lens"),
    ],
)
def test_a_plural_has_no_article(phrase, expected):
    assert with_article(phrase) == expected


def test_a_caption_of_two_colours_is_refused():
    heart, rng = disc()._replace(words=("red heart",)), np.random.default_rng(0)
    with pytest.raises(ValueError, match="expected one colour in a caption, got blue and red"):
        caption(Scene(heart, "blue"), rng)
    assert "blue love heart" in caption(Scene(heart._replace(words=("red heart", "love heart")), "blue"), rng)


def test_paraphrases_are_plain():
    table = paraphrases()
    phrases = [phrase for several in table.values() for phrase in several]
    assert len(table) > 1500 and all(2 <= len(several) <= 5 for several in table.values())
    assert len(set(phrases)) == len(phrases)
    assert all(phrase == phrase.strip() and 0 < len(phrase) <= 45 for phrase in phrases)
    assert all(not phrase.startswith(ARTICLES) for name in table for phrase in words_for(name, ()))
