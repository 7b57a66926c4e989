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
SINGULAR = ("ananas", "lens", "rhinoceros")


def is_countable(phrase: str) -> bool:
    """Whether `plural` knows the plural of the phrase: one or two words of lower-case letters, the last a singular."""
    last = phrase.split()[-1]
    return re.fullmatch(r"[a-z]+( [a-z]+)?", phrase) is not None and not last.endswith(("s", "ing", "ed"))


def is_plural(phrase: str) -> bool:
    """Whether the noun before any preposition or participle is a plural: "french fries", not "owl with big eyes"."""
    noun = re.split(r" (?:and|at|for|from|in|of|on|that|under|until|who|with|you|[a-z]+ing) ", phrase)[0].split()[-1]
    return re.search("[^sui]s$", noun) is not None and noun not in SINGULAR


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
