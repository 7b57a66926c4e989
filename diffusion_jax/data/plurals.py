"""Plurals of short English noun phrases."""

import re

IRREGULAR = {
    "fish": "fish",
    "sheep": "sheep",
    "deer": "deer",
    "bison": "bison",
    "squid": "squid",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
    "leaf": "leaves",
    "knife": "knives",
    "wolf": "wolves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "person": "people",
    "child": "children",
}


def is_countable(phrase: str) -> bool:
    """Whether `plural` knows the plural of the phrase: one or two words of lower-case letters, the last a singular."""
    last = phrase.split()[-1]
    return re.fullmatch(r"[a-z]+( [a-z]+)?", phrase) is not None and not last.endswith(("s", "ing", "ed"))


def plural(phrase: str) -> str:
    """The plural of a phrase that is countable: "red apple" -> "red apples"."""
    *before, noun = phrase.split()
    return " ".join([*before, IRREGULAR.get(noun) or _regular(noun)])


def _regular(noun: str) -> str:
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun.endswith(("x", "ch", "sh", "z")):
        return noun + "es"
    if re.search("[^aeiou]y$", noun):
        return noun[:-1] + "ies"
    return noun + "s"
