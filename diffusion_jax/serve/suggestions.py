"""What the page suggests to type: words that the model was trained with, and examples of its pictures."""

import base64
from collections.abc import Iterable

from ml_collections import ConfigDict

from diffusion_jax.build import shipped
from diffusion_jax.data.captions import STYLE_SUFFIXES, everyday_words, with_article
from diffusion_jax.data.colours import COLOURS
from diffusion_jax.data.concepts import concept_lists

EXAMPLES = 8
CLASSES = 1000  # the most classes whose numbers are suggested


def vocabulary(config: ConfigDict, words: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """names, colours, styles and grounds that prompts may have; empty where nothing is known of them.

    words: learned words, which are names too.
    """
    condition, data = config.get("condition", {}), config.get("data", {})
    names, others = (), {"colours": (), "styles": (), "grounds": ()}
    if data.get("source") == "emoji" and condition.get("kind") == "text":
        lists, first_word = concept_lists(), everyday_words()
        concepts = [name for given in data.concepts or ("everyday",) for name in lists.get(given, (given,))]
        names = (first_word.get(name, (name,))[0] for name in concepts)
        styles = tuple(suffixes[0] for suffixes in STYLE_SUFFIXES.values())
        grounds = tuple(f"on {with_article(colour)} background" for colour in COLOURS)
        others = {"colours": tuple(COLOURS), "styles": styles, "grounds": grounds}
    elif condition.get("kind") == "class" and condition.num_classes <= CLASSES:
        names = map(str, range(condition.num_classes))
    return {"names": tuple(dict.fromkeys((*names, *words))), **others}


def examples(origin: str) -> tuple[str, ...]:
    """Pictures that the model made, with their settings, PNG in base64: the first eight in the folder `examples` of its
    weights.
    """
    folder = shipped.find(origin) / "examples"
    files = sorted(folder.glob("*.png"))[:EXAMPLES] if folder.is_dir() else []
    return tuple(base64.b64encode(file.read_bytes()).decode() for file in files)
