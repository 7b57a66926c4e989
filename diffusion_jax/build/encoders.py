"""config.condition -> text encoders.

An entry of condition.encoders is `minilm` or the folder of an encoder, and may have settings after an @:
FOLDER@layer=penultimate,length=77.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion_jax import paths
from diffusion_jax.build import fields
from diffusion_jax.build.choice import DTYPES, choose
from diffusion_jax.interop.encoders import fingerprint, text_encoder, text_encoder_of, tokenizer_beside
from diffusion_jax.interop.folders import read_config
from diffusion_jax.interop.text import minilm, minilm_folder
from diffusion_jax.models.text.encoder import TextEncoder

MINILM = "minilm"
SHA = 16  # digits of a hash that are kept
FLAGS = {"True": True, "true": True, "False": False, "false": False}


def _layer(value: str) -> str | int:
    return int(value) if value.isdecimal() else value


SETTINGS: dict[str, Callable[[str], Any]] = {  # of an encoder: name -> its value from a text
    "layer": _layer,
    "norm": lambda value: FLAGS[value],
    "length": int,
    "pooled": lambda value: FLAGS[value],
    "sha": str,
}
USE = "FOLDER@layer=last or penultimate or a number, norm=True or False, length=77, pooled=True or False"


class Entry(NamedTuple):
    """One of condition.encoders. source: `minilm` or a folder. settings: those that it has."""

    source: str
    settings: dict[str, Any]


def entries(section: ConfigDict) -> list[Entry]:
    """The entries of condition.encoders. Raises ValueError for one that cannot be read."""
    texts = fields.section(fields.CONDITION, **section).encoders
    if not texts:
        raise ValueError("config.condition.encoders is empty: name minilm, or folders of text encoders")
    return [_entry(text) for text in texts]


def _entry(text: str) -> Entry:
    source, at, listed = text.rpartition("@")
    if not at or "=" not in listed:
        return Entry(text, {})
    settings = {}
    for setting in listed.split(","):
        name, _, value = setting.strip().partition("=")
        try:
            settings[name] = SETTINGS[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"config.condition.encoders: expected {USE}; got {setting!r} in {text!r}") from None
    if "sha" in settings and source == MINILM:
        raise ValueError(f"config.condition.encoders: {MINILM} has no files to compare with sha; got {text!r}")
    return Entry(source, settings)


def text_encoders(section: ConfigDict) -> list[TextEncoder]:
    """The encoders of condition.encoders, each with condition.length and condition.pooled unless its entry says
    otherwise.

    Raises FileNotFoundError and ValueError for what is no text encoder, and for one that is not that of its hash.
    """
    section = fields.section(fields.CONDITION, **section)
    return [_text_encoder(entry, section) for entry in entries(section)]


def _text_encoder(entry: Entry, section: ConfigDict) -> TextEncoder:
    settings = {"length": section.length, "pooled": section.pooled} | entry.settings
    sha, pooled = settings.pop("sha", ""), settings.pop("pooled")
    dtype = choose(DTYPES, section.dtype, "condition.dtype")
    if entry.source == MINILM:
        return minilm(**settings, dtype=dtype)._replace(pooled=pooled)
    check_sha(entry.source, sha)
    return text_encoder(entry.source, **settings, dtype=dtype)._replace(pooled=pooled)


def check_sha(folder: str, expected: str) -> None:
    """Raise ValueError unless the hash of an encoder's files begins as expected; "" is any."""
    found = _sha(folder) if expected else ""
    if not found.startswith(expected) and not expected.startswith(found):
        raise ValueError(
            f"{folder} is not the text encoder that this model was trained with: its files have the hash {found}, "
            f"expected {expected}; name the right one by --config.condition.encoders"
        )


def _sha(folder: str) -> str:
    return fingerprint(folder, tokenizer_beside(folder))[:SHA]


def pinned(section: ConfigDict) -> tuple[str, ...]:
    """condition.encoders with absolute folders and the hash of their files, for the config of a run."""
    return tuple(_pinned(entry) for entry in entries(section))


def _pinned(entry: Entry) -> str:
    source, settings = entry
    if source != MINILM:
        settings = settings | {"sha": settings.get("sha") or _sha(source)}
        source = str(paths.absolute(source))
    listed = ",".join(f"{name}={value}" for name, value in settings.items())
    return f"{source}@{listed}" if listed else source


def check_same(section: ConfigDict, trained: ConfigDict, where: str) -> None:
    """Raise ValueError unless two sections name the same encoders. Their folders may differ, their files may not.

    trained: the section of a run, whose encoders are `pinned`.
    where: the folder of that run, for the error.
    """
    ours, theirs = entries(section), entries(trained)
    names = [[(_name(entry), {**entry.settings, "sha": ""}) for entry in listed] for listed in (ours, theirs)]
    if names[0] != names[1]:
        raise ValueError(
            f"config.condition.encoders: the weights in {where} were trained with {', '.join(pinned(trained))}, got "
            f"{', '.join(pinned(section))}"
        )
    for entry, other in zip(ours, theirs, strict=True):
        check_sha(entry.source, other.settings.get("sha", ""))


def _name(entry: Entry) -> str:
    return MINILM if entry.source == MINILM else "folder"


def width(section: ConfigDict) -> int:
    """The channels of the condition's tokens. Reads no weights."""
    section = fields.section(fields.CONDITION, **section)
    folders = [minilm_folder() if entry.source == MINILM else entry.source for entry in entries(section)]
    modules = [text_encoder_of(*read_config(folder))[0] for folder in folders]
    widths = [getattr(module, "d_model", None) or module.hidden_size for module in modules]
    return max(widths) if section.join == "tokens" else sum(widths)
