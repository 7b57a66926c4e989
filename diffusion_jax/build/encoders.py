"""config.condition -> text encoders.

An entry of condition.encoders is `minilm` or the folder of an encoder, and may have settings after an @:
FOLDER@layer=penultimate,length=77.
"""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from diffusion_jax import paths
from diffusion_jax.build import fields
from diffusion_jax.build.choice import DTYPES, choose
from diffusion_jax.interop.encoders import files_of, text_encoder, tokenizer_beside
from diffusion_jax.interop.fingerprint import fingerprint
from diffusion_jax.interop.text import minilm, minilm_folder
from diffusion_jax.interop.tokenizers import load_tokenizer
from diffusion_jax.models.text.encoder import TextEncoder
from diffusion_jax.paths import Path

MINILM, MINILM_KEY = "minilm", "all-MiniLM-L6-v2"
SHA = 16  # digits of a hash that are kept
FLAGS = {"True": True, "true": True, "False": False, "false": False}
DEFAULT = fields.CONDITION["encoders"].default
ABSENT = (
    "{}: no such folder of a text encoder; copy it there, or name its place by --config.condition.encoders (a training "
    "does without it if all of its captions and prompts are in its cache: docs/text.md)"
)


def _layer(value: str) -> str | int:
    return int(value) if value.isdecimal() else value


def _length(value: str) -> int:
    if out_of_range := fields.CONDITION["length"].check(int(value)):
        raise ValueError(out_of_range)
    return int(value)


SETTINGS: dict[str, Callable[[str], Any]] = {  # of an encoder: name -> its value from a text
    "layer": _layer,
    "norm": lambda value: FLAGS[value],
    "length": _length,
    "pooled": lambda value: FLAGS[value],
    "sha": str,
}
USE = "FOLDER@layer=last or penultimate or a number, norm=True or False, length=3 to 512 tokens, pooled=True or False"


class Entry(NamedTuple):
    """One entry of condition.encoders.

    source: `minilm` or a folder.
    settings: those after the @.
    """

    source: str
    settings: dict[str, Any]

    def __str__(self) -> str:
        listed = ",".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.source}@{listed}" if listed else self.source

    @property
    def is_folder(self) -> bool:
        """Whether it is the folder of an encoder."""
        return self.source != MINILM


def entries(section: ConfigDict) -> list[Entry]:
    """The entries of condition.encoders. Raises ValueError for one that cannot be read."""
    texts = section.get("encoders", DEFAULT)
    if not texts:
        raise ValueError("config.condition.encoders is empty: name minilm, or folders of text encoders")
    return [_entry(text) for text in texts]


def _entry(text: str) -> Entry:
    source, at, listed = text.rpartition("@")
    if not at or "=" not in listed:
        source, listed = text, ""
    if not source:
        raise ValueError(f"config.condition.encoders: expected {MINILM} or a folder, got {text!r}")
    settings = {}
    for setting in listed.split(",") if listed else ():
        name, _, value = setting.strip().partition("=")
        try:
            if name in settings:
                raise KeyError(name)
            settings[name] = SETTINGS[name](value)
        except (KeyError, ValueError):
            raise ValueError(f"config.condition.encoders: expected {USE}; got {setting!r} in {text!r}") from None
    if "sha" in settings and source == MINILM:
        raise ValueError(f"config.condition.encoders: {MINILM} has no files to compare with sha; got {text!r}")
    return Entry(source, settings)


def text_encoders(section: ConfigDict) -> list[TextEncoder]:
    """The encoders of condition.encoders, each with condition.length and condition.pooled unless its entry says
    otherwise.

    section: all fields of config.condition.
    Raises FileNotFoundError and ValueError for a folder without a text encoder, and for an encoder of another hash.
    """
    check_present(section)
    return [_text_encoder(entry, section) for entry in entries(section)]


def _text_encoder(entry: Entry, section: ConfigDict) -> TextEncoder:
    settings = {"length": section.length, "pooled": section.pooled} | entry.settings
    sha, pooled = settings.pop("sha", ""), settings.pop("pooled")
    dtype = choose(DTYPES, section.dtype, "condition.dtype")
    if not entry.is_folder:
        return minilm(**settings, dtype=dtype)._replace(pooled=pooled)
    if sha:
        _check_sha(entry.source, _sha(entry.source), sha)
    encoder = text_encoder(entry.source, **settings, dtype=dtype, allow_pickle=section.allow_pickle)
    return encoder._replace(pooled=pooled)


def tokenizers(section: ConfigDict) -> dict[str, Tokenizer]:
    """{`minilm` or folder: tokenizer} of the encoders, without those whose folder does not exist."""
    present = [entry for entry in entries(section) if not entry.is_folder or _exists(entry.source)]
    folders = [tokenizer_beside(entry.source) if entry.is_folder else minilm_folder() for entry in present]
    lengths = [entry.settings.get("length", section.length) for entry in present]
    names = [entry.source for entry in present]
    return dict(zip(names, map(load_tokenizer, folders, lengths), strict=True))


def check_present(section: ConfigDict) -> None:
    """Raise FileNotFoundError for the folder of an encoder that does not exist."""
    for entry in entries(section):
        if entry.is_folder and not _exists(entry.source):
            raise FileNotFoundError(ABSENT.format(entry.source))


def _exists(folder: str) -> bool:
    return paths.at(folder).exists()


def _sha(folder: str) -> str:
    encoder, tokenizer = files_of(folder)
    return fingerprint([*encoder, *tokenizer])[:SHA]


def _check_sha(folder: str, found: str, expected: str) -> None:
    """Raise ValueError unless the hash of an encoder begins as expected."""
    if not found.startswith(expected[:SHA]):
        raise ValueError(
            f"{folder} is not the text encoder that this model was trained with: its files have the hash {found}, "
            f"expected {expected}; name the right one by --config.condition.encoders"
        )


def _identity(entry: Entry) -> str:
    """The hash of an encoder's files: the one that its entry has, whole, or else that of its folder; "" without both.

    Raises ValueError for a folder whose hash does not begin as its entry says.
    """
    given = entry.settings.get("sha", "")
    if len(given) >= SHA or not _exists(entry.source):
        return given[:SHA]
    found = _sha(entry.source)
    _check_sha(entry.source, found, given)
    return found


def cache_key(section: ConfigDict) -> str:
    """A key for everything that an embedding depends on besides its text. Reads no weights of entries with a hash.

    section: all fields of config.condition.
    """
    listed = entries(section)
    keys = [_key(entry, section) for entry in listed]
    return f"{' '.join(keys)}{' on tokens' * (section.join == 'tokens' and len(listed) > 1)}"


def _key(entry: Entry, section: ConfigDict) -> str:
    settings = {"layer": "last", "norm": None, "length": section.length, "pooled": section.pooled} | entry.settings
    layer, norm, length, pooled, *_ = settings.values()
    usual = (layer, norm, section.dtype) == ("last", None, "float32")
    changed = "" if usual else f"-{layer}-{norm}-{section.dtype}"
    return f"{_identity(entry) if entry.is_folder else MINILM_KEY}-{length}{changed}{' pooled' * pooled}"


def pinned(section: ConfigDict, of_run: ConfigDict | None = None) -> tuple[str, ...]:
    """condition.encoders with absolute folders and the hash of their files, for the config of a run.

    of_run: the section of the run, if it has begun. It gives the hash of a folder that does not exist any more.
    Raises FileNotFoundError for a folder that does not exist and whose hash is not known.
    """
    listed = entries(section)
    begun = entries(of_run) if of_run is not None else []
    hashes = [entry.settings.get("sha", "") for entry in begun] if _same(listed, begun) else [""] * len(listed)
    return tuple(str(_pinned(entry, known)) for entry, known in zip(listed, hashes, strict=True))


def _pinned(entry: Entry, known: str) -> Entry:
    if not entry.is_folder:
        return entry
    sha = _identity(entry)
    if not _exists(entry.source):
        sha = known if known.startswith(sha) else sha
        if not sha:
            raise FileNotFoundError(ABSENT.format(entry.source))
        logging.info("%s is not there: only cached embeddings of this text encoder, %s, are used", entry.source, sha)
    return Entry(str(paths.absolute(entry.source)), entry.settings | {"sha": sha})


def check_same(section: ConfigDict, trained: ConfigDict, where: str) -> None:
    """Raise ValueError unless two sections name the same encoders. Their folders may differ, their files may not.

    trained: the section of a run, whose encoders are `pinned`.
    where: the folder of that run, for the error.
    """
    ours, theirs = entries(section), entries(trained)
    if not _same(ours, theirs):
        raise ValueError(
            f"config.condition.encoders: the weights in {where} were trained with {', '.join(map(str, theirs))}, got "
            f"{', '.join(map(str, ours))}"
        )
    for entry, other in zip(ours, theirs, strict=True):
        if entry.is_folder and (found := _identity(entry)):
            _check_sha(entry.source, found, other.settings.get("sha", ""))


def _same(ours: list[Entry], theirs: list[Entry]) -> bool:
    """Whether the entries are alike but for folders and hashes."""
    first, second = ([(entry.is_folder, {**entry.settings, "sha": ""}) for entry in each] for each in (ours, theirs))
    return first == second


def copied(section: ConfigDict, folder: Path) -> tuple[str, ...]:
    """Copy the encoders and their tokenizers into a folder, as text_encoder and tokenizer, text_encoder_2 and
    tokenizer_2, and so on. Returns condition.encoders with these names and the hash of the files.
    """
    check_present(section)
    names: dict[str, str] = {}
    listed = [_pinned(entry, "") for entry in entries(section)]
    for source, sha in {entry.source: entry.settings["sha"] for entry in listed if entry.is_folder}.items():
        _check_sha(source, _sha(source), sha)
        number = f"_{len(names) + 1}" * bool(names)
        for name, files in zip((f"text_encoder{number}", f"tokenizer{number}"), files_of(source), strict=True):
            _copy(files, folder / name)
        names[source] = f"text_encoder{number}"
    return tuple(str(entry._replace(source=names.get(entry.source, entry.source))) for entry in listed)


def _copy(files: list[pathlib.Path], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with paths.written(folder / file.name) as unfinished:
            shutil.copyfile(file, unfinished)


def found_in(section: ConfigDict, folder: Path) -> tuple[str, ...]:
    """condition.encoders of the config.json in a folder. Names that are not absolute are folders next to that file."""
    return tuple(
        str(entry._replace(source=str(folder / entry.source)) if _is_beside(entry) else entry)
        for entry in entries(section)
    )


def _is_beside(entry: Entry) -> bool:
    return entry.is_folder and not paths.in_bucket(entry.source) and not pathlib.Path(entry.source).is_absolute()
