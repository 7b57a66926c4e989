"""What people call a scene: names and paraphrases of its concept, and words for its colour, style, ground and place."""

import functools
from collections.abc import Sequence
from importlib.resources import files

import numpy as np

from diffusion_jax.data.colours import COLOURS
from diffusion_jax.data.scenes import Scene

BEFORE = {  # a style's words before the noun phrase
    "outlined": ("an outlined drawing of", "a coloured drawing with outlines of"),
    "flat": ("a flat drawing of", "a flat picture of"),
    "line": ("a line drawing of", "line art of"),
    "shaded": ("a shaded drawing of", "a glossy picture of"),
}
AFTER = {  # and after it
    "outlined": ("outlined", "with outlines"),
    "flat": ("flat", "in flat style"),
    "line": ("line drawing", "in lines"),
    "shaded": ("shaded", "glossy"),
}
ARTICLES = ("a ", "an ", "the ")


@functools.cache
def paraphrases() -> dict[str, tuple[str, ...]]:
    """Name of a concept -> what else people call it. Written for this data set; flags have none."""
    lines = files("diffusion_jax.data").joinpath("paraphrases.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(": ", 1) for line in lines)
    return {name: tuple(phrases.split(" | ")) for name, phrases in pairs}


def words_for(name: str, aliases: Sequence[str]) -> tuple[str, ...]:
    """All noun phrases for a concept, without their articles: its name, then its aliases and paraphrases."""
    phrases = dict.fromkeys(bare(phrase) for phrase in (name, *aliases, *paraphrases().get(name, ())))
    return tuple(phrases)


def bare(phrase: str) -> str:
    """The phrase without its article."""
    return next((phrase[len(article) :] for article in ARTICLES if phrase.startswith(article)), phrase)


def caption(scene: Scene, words: Sequence[str], rng: np.random.Generator) -> str:
    """A caption of the scene, such as "a small purple cat at the top on a yellow background, flat".

    words: noun phrases for its concept, as `words_for` makes them. Half of the captions use the first that fits.
    The style is left out in a quarter of the captions, the article in half of them.
    Raises ValueError for a colour if all noun phrases name one too.
    """
    fitting = [phrase for phrase in words if not (scene.colour and colours_in(phrase))]
    if not fitting:
        raise ValueError(f"expected one colour in a caption, got {scene.colour} and {', '.join(colours_in(words[0]))}")
    noun = fitting[0] if len(fitting) == 1 or rng.random() < 0.5 else fitting[1 + rng.integers(len(fitting) - 1)]
    phrase = " ".join(part for part in (scene.size, scene.colour, noun) if part)
    if rng.random() < 0.5:
        phrase = with_article(phrase)
    where = [scene.place] if scene.place else []
    where += [f"on a{'n' * (scene.ground[0] in 'aeiou')} {scene.ground} background"] if scene.ground else []
    said = " ".join([phrase, *where])
    kind = rng.random()
    if kind < 0.25:
        return said
    if kind < 0.6:
        return f"{rng.choice(BEFORE[scene.style])} {' '.join([with_article(bare(phrase)), *where])}"
    return f"{said}, {rng.choice(AFTER[scene.style])}"


def colours_in(phrase: str) -> list[str]:
    """The named colours of a phrase."""
    return [word for word in phrase.lower().split() if word in COLOURS]


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an"."""
    return f"{'an' if phrase[0].lower() in 'aeiou' else 'a'} {phrase}"
