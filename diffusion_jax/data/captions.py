"""Captions of scenes: names and paraphrases of the concept, and words for its colour, style, ground and place."""

import functools
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from diffusion_jax.data.colours import COLOURS
from diffusion_jax.data.concepts import concept_lists
from diffusion_jax.data.plurals import is_countable, is_plural, plural
from diffusion_jax.data.scenes import Drawing, Scene, usual_ground

STYLE_PREFIXES = {  # words for a style before the noun phrase
    "outlined": ("an outlined drawing of", "a coloured drawing with outlines of"),
    "flat": ("a flat drawing of", "a flat picture of"),
    "line": ("a line drawing of", "line art of"),
    "shaded": ("a shaded drawing of", "a glossy picture of"),
}
STYLE_SUFFIXES = {  # words for a style after the noun phrase
    "outlined": ("outlined", "with outlines"),
    "flat": ("flat", "in flat style"),
    "line": ("line drawing", "in lines"),
    "shaded": ("shaded", "glossy"),
}
DEFAULT_STYLE = "outlined"  # the style of a caption that names none
NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}
ARTICLES = ("a ", "an ", "the ")


@functools.cache
def paraphrases() -> dict[str, tuple[str, ...]]:
    """Name of a concept -> what else people call it. Written for this data set; flags have none."""
    return _phrases("paraphrases.txt")


@functools.cache
def everyday_words() -> dict[str, tuple[str, ...]]:
    """Name of a concept -> what most people call it, where that is not its name: "hot beverage" -> "cup"."""
    return _phrases("everyday_words.txt")


def _phrases(file: str) -> dict[str, tuple[str, ...]]:
    lines = files("diffusion_jax.data").joinpath(file).read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ", 1) for line in lines)
    return {name: tuple(phrases.split(" | ")) for name, phrases in pairs}


def words_for(name: str, aliases: Sequence[str]) -> tuple[str, ...]:
    """All noun phrases for a concept, without their articles: everyday words, its name, aliases and paraphrases. What
    first comes to mind at another everyday thing is left out: a rabbit's face is no "rabbit".
    """
    phrases = (*everyday_words().get(name, ()), name, *aliases, *paraphrases().get(name, ()))
    words = dict.fromkeys(without_article(phrase) for phrase in phrases)
    return tuple(word for word in words if _first_words().get(word, name) == name)


@functools.cache
def _first_words() -> dict[str, str]:
    """What first comes to mind at an everyday thing -> its name."""
    return {everyday_words().get(name, (name,))[0]: name for name in concept_lists()["everyday"]}


def without_article(phrase: str) -> str:
    """The phrase without its article."""
    return next((phrase[len(article) :] for article in ARTICLES if phrase.startswith(article)), phrase)


def caption(scene: Scene, rng: np.random.Generator, styled: bool = False) -> str:
    """A caption of the scene, such as "a small purple cat at the top on a yellow background, flat".

    Half of the captions use the first noun phrase that fits. The style is left out in half of the captions of outlined
    drawings, so that a prompt without a style means one style; the article in half of those of one drawing; the usual
    ground of white things in half of those without a second drawing.

    styled: always name the style, and never the usual ground.
    Raises ValueError for a colour if all noun phrases of its drawing name one too, and for several copies of a drawing
    without a plural here.
    """
    drawing, other = scene.drawing, scene.other
    if scene.count > 1:
        countable = [word for word in _fitting_phrases(drawing, scene.colour) if is_countable(word)]
        if not countable:
            raise ValueError(f"expected one drawing of {drawing.name}, which has no plural here; got {scene.count}")
        phrase = _join_words(NUMBERS[scene.count], scene.size, scene.colour, plural(_choose_phrase(countable, rng)))
    else:
        phrase = _join_words(scene.size, scene.colour, _choose_phrase(_fitting_phrases(drawing, scene.colour), rng))
        phrase = with_article(phrase) if other or rng.random() < 0.5 else phrase
    details = [scene.place] if scene.place else []
    if other:
        second = _join_words(other.colour, _choose_phrase(_fitting_phrases(other.drawing, other.colour), rng))
        details.append(f"{other.relation} {with_article(second)}")
    is_usual = not other and scene.ground == usual_ground(drawing, scene.colour)
    if scene.ground and not (is_usual and (styled or rng.random() < 0.5)):
        details.append(f"on {with_article(scene.ground)} background")
    description = " ".join([phrase, *details])
    if drawing.style == DEFAULT_STYLE and not styled and rng.random() < 0.5:
        return description
    if rng.random() < 0.5:
        noun = phrase if scene.count > 1 else with_article(without_article(phrase))
        return f"{rng.choice(STYLE_PREFIXES[drawing.style])} {' '.join([noun, *details])}"
    return f"{description}, {rng.choice(STYLE_SUFFIXES[drawing.style])}"


def _fitting_phrases(drawing: Drawing, colour: str) -> list[str]:
    """The noun phrases of a drawing that do not contradict its colour."""
    phrases = [phrase for phrase in drawing.words if not (colour and colours_in(phrase))]
    if not phrases:
        colour_names = ", ".join(colours_in(drawing.words[0]))
        raise ValueError(f"expected one colour in a caption, got {colour} and {colour_names}")
    return phrases


def _choose_phrase(phrases: Sequence[str], rng: np.random.Generator) -> str:
    """The first phrase in half of the cases, else another one."""
    if len(phrases) == 1 or rng.random() < 0.5:
        return phrases[0]
    return phrases[1 + rng.integers(len(phrases) - 1)]


def _join_words(*words: str) -> str:
    return " ".join(filter(None, words))


def colours_in(phrase: str) -> list[str]:
    """The named colours of a phrase."""
    return [word for word in phrase.lower().split() if word in COLOURS]


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an", without one if it is a plural."""
    if is_plural(phrase):
        return phrase
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"
