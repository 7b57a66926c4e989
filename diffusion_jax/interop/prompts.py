"""Weighted prompts of several chunks for CLIP's encoders, in the grammar of popular web interfaces.

    (word)       its tokens count 1.1 times          ((word))     1.1 · 1.1 times
    (word:1.3)   1.3 times                           [word]       1 / 1.1 times
    \\( \\) \\[ \\] \\\\   the characters themselves
    a BREAK b        b begins a new chunk

Brackets nest and their weights multiply. A bracket that is never closed extends to the end of the prompt. A closing
bracket without an opening one is a plain character, and so is a colon not followed by a number and a round bracket. Any
other backslash is dropped.

Other syntax of these and similar programs is refused: AND (several prompts) and the words of regions, [a:b:0.5] and
[a|b] (prompts that change between steps), {a|b}, ${a} and __name__ (random words), <lora:name:1> and embedding:name
(files). A backslash before the first character keeps what follows as text. What may as well be text, such as word++
and 1.3::word, is read as text with a warning. Learned words (`embeddings`) may have brackets in their names.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int, PyTree
from tokenizers import Tokenizer

from diffusion_jax.models.text.encoder import tokenize

EMPHASIS = 1.1
ROUND, SQUARE = "()", "[]"
BREAK = re.compile(r"\bBREAK\b")
MAX_CHUNKS = 32  # of a prompt: each number of chunks compiles its own programs, whose memory grows with it
MAX_WEIGHT = 1e6  # far more than any use, and far from what float32 cannot hold
SHOWN = 60  # letters of a prompt in a message
FILES = "LoRAs (loras, merge_lora) and learned words (embeddings, add_embeddings) are loaded with the model"
REFUSED = {
    r"(?<!\\)\bAND\b": 'combines several prompts in web interfaces, which is not supported; write "and" for the word',
    r"(?<!\\)\bADD(?:COMM|BASE|COL|ROW)\b": "divides the picture into regions in web interfaces, "
    "which is not supported",
    r"\)\s*\.(?:and|blend|swap)\(": "combines several prompts in InvokeAI, which is not supported",
    r"(?<!\\)\)(?:\d*\.\d+|\++|--+)(?=[\s,)]|$)": "is a weight in InvokeAI and compel; write it as in (words:1.2)",
    r"(?<!\S)--(?:ar|aspect|chaos|cref|cw|hd|iw|niji|no|oref|ow|profile|q|quality|repeat|s|seed|sref|stop|style|stylize"
    r"|sv|sw|tile|v|version|weird)\b": "is an option of Midjourney, which is not supported",
    r"(?<!\\)<\w+:[^<>]*>": f"names a file, which prompts cannot load: {FILES}",
    r"(?<![\w\\])embedding:[^\s,:()]+": f"is a learned word in ComfyUI; write its name alone: {FILES}",
    r"(?<!\\)\{[^{}|]*\|[^{}]*\}": "draws one of several words in other programs, which is not supported; write one, "
    "or \\{ for the character",
    r"(?<!\\)\$\{": "is a variable in other programs, which is not supported; write \\$ for the character",
    r"(?<![\w\\])__[\w*/.-]+?__(?!\w)": "draws a word of a list in other programs, which is not supported; write one, "
    "or \\_ for the character",
}
WEIGHT = "is a weight in other programs; write it as in (words:1.2)"
DOUBTFUL = {  # may be meant as text, and is read as such, with a warning
    r"\b[^\W\d_]{2,}(?:\++|--+)(?=[\s,)]|$)": WEIGHT,
    r"(?<![\d.])[\d.]+::|::\s*-?[\d.]+": WEIGHT,
    r"(?<!\S)--[a-z]+\b": "is an option in other programs",
}
# the end of [a:b:0.5], [a:0.5], [a::12], and anything with alternatives, [a|b]: a share of the steps, or a step
SCHEDULED = re.compile(r":\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?\s*$|(?<!\\)\|", re.IGNORECASE)
# escaped character | closing bracket with its weight | bracket | other text
SYMBOLS = re.compile(r"(\\[\\()\[\]]?)|:\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*\)|([()\[\]])|[^\\()\[\]:]+|:")


def parse(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt into (text, weight) pieces, merging neighbours of equal weight. An empty prompt is [("", 1.0)].

    Raises ValueError for syntax that is not supported.
    """
    for pattern, reason in REFUSED.items():
        found = re.search(pattern, prompt)
        if found:
            raise ValueError(f"prompt: {found[0][:SHOWN]} {reason}")
    texts: list[str] = []
    factors: list[tuple[int, int | None, float]] = []  # first text, the one after the last, and their factor
    # of each open bracket: index of the text after it, and its place in the prompt
    opened: dict[str, list[tuple[int, int]]] = {ROUND: [], SQUARE: []}
    implied = {ROUND: EMPHASIS, SQUARE: 1 / EMPHASIS}
    for symbol in SYMBOLS.finditer(prompt):
        escaped, number, bracket = symbol.groups()
        kind = SQUARE if bracket and bracket in SQUARE else ROUND
        if bracket and bracket == kind[0]:
            opened[kind].append((len(texts), symbol.start()))
        elif (bracket or number) and opened[kind]:
            start, place = opened[kind].pop()
            if kind == SQUARE:
                _refuse_schedule(prompt[place : symbol.end()])
            factors.append((start, len(texts), implied[kind] if number is None else float(number)))
        else:
            texts.append(escaped[1:] if escaped else symbol.group())
    factors += [(start, None, implied[kind]) for kind, starts in opened.items() for start, _ in starts]
    weights = np.ones(len(texts))
    with np.errstate(over="ignore"):
        for start, end, factor in factors:
            weights[start:end] *= factor
    if not np.all(np.abs(weights) <= MAX_WEIGHT):
        raise ValueError(f"prompt: it has a weight above {MAX_WEIGHT:g}; write a smaller one")
    return _joined(list(zip(texts, weights.tolist(), strict=True)))


def is_syntax(word: str) -> bool:
    """Whether a learned word would mean something else in prompts, where its brackets are `escaped`."""
    try:
        return bool(BREAK.search(word)) or parse(_escaped(word)) != [(word, 1.0)]
    except ValueError:
        return True


def _escaped(word: str) -> str:
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", word)


def _refuse_schedule(bracketed):
    if SCHEDULED.search(bracketed[1:-1]):
        raise ValueError(
            f"prompt: {bracketed[:SHOWN]} changes between steps in web interfaces, which is not supported; write \\[ "
            "and \\] for the characters, and (a:1.2) for a weight"
        )


def _joined(pieces):
    joined = [("", 1.0)] if not pieces else pieces[:1]
    for text, weight in pieces[1:]:
        if weight == joined[-1][1]:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def chunk(
    pieces: Sequence[tuple[str, float]], tokenizer: Tokenizer
) -> tuple[Int[np.ndarray, "chunks length"], Float[np.ndarray, "chunks length"]]:
    """Token ids of a prompt's pieces, in as many chunks as needed, and the weight of each token.

    tokenizer: from `load_tokenizer`, with L tokens including a start and an end token. A chunk has these two around at
      most L - 2 tokens of the prompt (75 of 77), then padding. Their own weight is 1. A learned word that does not fit
      into the rest of a chunk begins the next one.
    Raises ValueError for a tokenizer of another family, and for a prompt of more than MAX_CHUNKS chunks.
    """
    num_special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if num_special != 2:
        raise ValueError(
            f"weighted prompts: expected CLIP's tokenizer, with a start and an end token, got {num_special} such tokens"
        )
    begin, end, *padding = tokenizer.encode("").ids
    sections: list[list[tuple[int, float]]] = [[]]
    for text, weight in pieces:
        first, *others = BREAK.split(text)
        sections[-1] += [(token, weight) for token in _token_ids(first, tokenizer)]
        sections += [[(token, weight) for token in _token_ids(other, tokenizer)] for other in others]
    if len(sections) > 1 and not sections[-1]:  # nothing after the last BREAK
        sections.pop()
    length = len(padding)
    vectors = {tokenizer.token_to_id(word): count for word, count in learned_words(tokenizer).items()}
    parts = [part for tokens in sections for part in _cut(tokens, length, vectors)]
    if len(parts) > MAX_CHUNKS:
        raise ValueError(
            f"prompt: it has {len(parts)} chunks of {length} tokens, expected at most {MAX_CHUNKS}; shorten it"
        )
    rows = [[(begin, 1.0), *part, (end, 1.0), *((pad, 1.0) for pad in padding[len(part) :])] for part in parts]
    ids, weights = np.moveaxis(np.array(rows), -1, 0)
    return ids.astype(np.int32), weights.astype(np.float32)


def _cut(tokens, length, vectors):
    """The tokens, (id, weight), in parts of at most `length`. vectors: first id of a learned word -> its length."""
    parts = [[]]
    for token, weight in tokens:
        if len(parts[-1]) + min(vectors.get(token, 1), length) > length:
            parts.append([])
        parts[-1].append((token, weight))
    return parts


def _token_ids(text, tokenizer):
    """Ids of a text of any length, without start and end token."""
    first = tokenizer.encode(spelled(text, tokenizer), add_special_tokens=False)
    parts = (first, *first.overflowing)
    return [i for part in parts for i, real in zip(part.ids, part.attention_mask, strict=True) if real]


def spelled(text: str, tokenizer: Tokenizer) -> str:
    """The text with all tokens of its learned words (`embeddings`): "word" becomes "word word_1 word_2".

    A word that begins or ends in a letter or digit is found only as a whole word there, another one such as <word>
    anywhere. The longest is found first.
    """
    spellings = {}
    for word, count in learned_words(tokenizer).items():
        tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
        spellings[word.lower()] = f" {' '.join(tokens)} " if count > 1 else word
    return _replaced(text, spellings)


def escaped(prompt: str, tokenizer: Tokenizer) -> str:
    """The prompt with backslashes before the brackets of its learned words, such as [V], where it has none."""
    words = learned_words(tokenizer)
    return _replaced(prompt, {word.lower(): _escaped(word) for word in words if _escaped(word) != word})


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with other texts for words, which are in lower case."""
    if not replacements:
        return text
    words = "|".join(map(_found, sorted(replacements, key=len, reverse=True)))
    return re.sub(words, lambda match: replacements[match[0].lower()], text, flags=re.IGNORECASE)


def learned_words(tokenizer: Tokenizer) -> dict[str, int]:
    """The learned words of a tokenizer, and how many tokens each has."""
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special}
    counts = {name: next(i for i in itertools.count(1) if f"{name}_{i}" not in names) for name in sorted(names)}
    further = {f"{name}_{i}" for name, count in counts.items() for i in range(1, count)}
    return {name: count for name, count in counts.items() if name not in further}


def _found(word: str) -> str:
    """The pattern that finds a learned word."""
    start, end = (r"(?<!\w)" if word[0].isalnum() else "", r"(?!\w)" if word[-1].isalnum() else "")
    return f"{start}{re.escape(word)}{end}"


def chunked_for_each(
    prompts: Sequence[str], tokenizers: Sequence[Tokenizer]
) -> list[tuple[Int[np.ndarray, "batch chunks _"], Float[np.ndarray, "batch chunks _"]]]:
    """Token ids and weights of prompts for each tokenizer, as in `chunked`.

    Tokenizers may cut a text into different tokens. All get as many chunks as the one that needs most, because the
    embeddings of several encoders are concatenated token by token. Warns of what may be meant as other syntax.
    """
    for prompt, (pattern, meaning) in itertools.product(prompts, DOUBTFUL.items()):
        if found := re.search(pattern, prompt):
            logging.warning("prompt: %s is read as text, though it %s", found[0][:SHOWN], meaning)
    of_each = [chunked(prompts, tokenizer) for tokenizer in tokenizers]
    most = max(ids.shape[1] for ids, _ in of_each)
    return [
        of_one if of_one[0].shape[1] == most else chunked(prompts, tokenizer, most)
        for of_one, tokenizer in zip(of_each, tokenizers, strict=True)
    ]


def in_one_chunk(
    texts: Sequence[str], tokenizers: Sequence[Tokenizer]
) -> list[tuple[Int[np.ndarray, "batch 1 _"], Float[np.ndarray, "batch 1 _"]]]:
    """Token ids of plain texts, without this module's grammar, cut to one chunk, and their weights, 1."""

    def of_one(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
        plain = [spelled(text, tokenizer) for text in texts]
        ids = tokenize(plain, tokenizer, tokenizer.padding["length"], warn=False)[0][:, None]
        return ids, np.ones(ids.shape, np.float32)

    return [of_one(tokenizer) for tokenizer in tokenizers]


def chunked(
    prompts: Sequence[str], tokenizer: Tokenizer, at_least: int = 1
) -> tuple[Int[np.ndarray, "batch chunks length"], Float[np.ndarray, "batch chunks length"]]:
    """Token ids and weights of prompts in this module's grammar, in chunks.

    All prompts get as many chunks as the longest, because one call guides by prompt and negative prompt. Extra chunks
    are empty.

    tokenizer: as in `chunk`.
    at_least: least number of chunks.
    """
    prompt_chunks = [chunk(parse(escaped(prompt, tokenizer)), tokenizer) for prompt in prompts]
    empty = chunk([], tokenizer)
    max_chunks = max(at_least, *(len(ids) for ids, _ in prompt_chunks))
    ids, weights = (
        np.stack(
            [
                np.concatenate([rows[i], np.repeat(empty[i], max_chunks - len(rows[i]), axis=0)])
                for rows in prompt_chunks
            ]
        )
        for i in range(2)
    )
    return ids, weights


def emphasised(text: Callable[[Any], Array]) -> Callable[..., tuple[Any, Array]]:
    """`Prompt.embed` of encoders that read ids alone, with the weights of `emphasise`.

    text: output of an encoder -> its tokens (rows, L, D).
    """

    def embed(encoder: Any, variables: PyTree, ids: Array, weights: Array) -> tuple[Any, Array]:
        output = encoder.apply(variables, ids)
        return output, emphasise(text(output).astype(jnp.float32), weights)

    return embed


def emphasise(
    z: Float[Array, "rows length width"], weights: Float[Array | np.ndarray, "batch chunks length"]
) -> Float[Array, "batch tokens width"]:
    """Weighted embeddings of chunks, concatenated: tokens = chunks · length.

        z' = (w · z) mean(z) / mean(w · z),    means over all tokens and channels of one chunk of one prompt

    A weight thus moves emphasis between the tokens of a chunk and keeps the mean of their embeddings, which the
    denoiser was trained on. If all weights are 1, z' = z. A chunk whose mean is almost 0 is not rescaled.

    z: embeddings of the chunks, rows = batch · chunks.
    """
    batch, chunks, length = weights.shape
    weighted = z * weights.reshape(batch * chunks, length, 1)
    mean_before, mean_after = (x.mean(axis=(1, 2), keepdims=True) for x in (z, weighted))
    threshold = 1e-4 * jnp.sqrt(jnp.square(z).mean(axis=(1, 2), keepdims=True))
    rescalable = (jnp.abs(mean_before) > threshold) & (jnp.abs(mean_after) > threshold)
    weighted = weighted * jnp.where(rescalable, mean_before / jnp.where(rescalable, mean_after, 1.0), 1.0)
    return weighted.reshape(batch, chunks * length, -1)
