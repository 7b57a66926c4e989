"""The grammar of weighted prompts, their chunks, and what weights do to embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diffusion_jax.interop.prompts import MAX_CHUNKS, chunk, chunked, chunked_for_each, emphasise, parse

WORDS = ["[PAD]", "[BEGIN]", "[END]", *"abcdefghij", ","]
LENGTH = 7  # room for 5
UP, DOWN = 1.1, 1 / 1.1


def word_tokenizer(*template):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=","))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(word, WORDS.index(word)) for word in template if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=list(template), special_tokens=marks)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer("[BEGIN]", "$A", "[END]")


def encode(ids):
    """An encoder in which every token sees the mean of those before it: (..., L) -> (rows, L, 6)."""
    table = jax.random.normal(jax.random.key(0), (len(WORDS), 6)) + 0.5
    z = table[ids.reshape(-1, LENGTH)]
    return z + jnp.cumsum(z, axis=1) / jnp.arange(1, LENGTH + 1)[:, None]


def embed(prompts, tokenizer):
    ids, weights = chunked(prompts, tokenizer)
    return emphasise(encode(ids), weights)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", [("", 1)]),
        ("a red cat", [("a red cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", UP), (" cat", 1)]),
        ("a ((red)) cat", [("a ", 1), ("red", UP * UP), (" cat", 1)]),
        ("a [red] [[cat]]", [("a ", 1), ("red", DOWN), (" ", 1), ("cat", DOWN * DOWN)]),
        ("(red:1.3)", [("red", 1.3)]),
        ("(red: .5 )(cat:2.)", [("red", 0.5), ("cat", 2)]),
        ("(a red:0) (cat:-1)", [("a red", 0), (" ", 1), ("cat", -1)]),
        ("(a (red:2) cat:1.5)", [("a ", 1.5), ("red", 3), (" cat", 1.5)]),
        ("(a [red] cat)", [("a ", UP), ("red", UP * DOWN), (" cat", UP)]),
        (r"smile \(art\) \[x\] \\", [("smile (art) [x] \\", 1)]),
        (r"(smile \(art\):1.2)", [("smile (art)", 1.2)]),
        (r"a\b", [("ab", 1)]),
        ("(red)(cat)", [("redcat", UP)]),
        ("time 12:30, (16:9 wide)", [("time 12:30, ", 1), ("16:9 wide", UP)]),
        ("(1.2.3:1.2.3)", [("1.2.3:1.2.3", UP)]),
        ("a (red cat", [("a ", 1), ("red cat", UP)]),
        ("a (([red cat", [("a ", 1), ("red cat", UP * UP * DOWN)]),
        ("a) red] cat:1.3)", [("a) red] cat:1.3)", 1)]),
        ("()", [("", 1)]),
        ("a and (b:1.2) | c, <b> [a:b]", [("a and ", 1), ("b", 1.2), (" | c, <b> ", 1), ("a:b", DOWN)]),
        (r"\[a:b:0.5\]", [("[a:b:0.5]", 1)]),
        (r"\{a|b} \__c__ \<d:e> \embedding:f", [("{a|b} __c__ <d:e> embedding:f", 1)]),
        ("{a} a_b__c __d embedding: e (f)- g --h", [("{a} a_b__c __d embedding: e ", 1), ("f", UP), ("- g --h", 1)]),
    ],
)
def test_grammar(prompt, pieces):
    parsed = parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    np.testing.assert_allclose([weight for _, weight in parsed], [weight for _, weight in pieces], rtol=1e-12)


@pytest.mark.parametrize("prompt", ["", "a b", "a b c d e"])
def test_a_short_prompt_is_the_tokenizers_own(prompt, tokenizer):
    ids, weights = chunk(parse(prompt), tokenizer)
    np.testing.assert_array_equal(ids, [tokenizer.encode(prompt).ids])
    assert (ids.dtype, weights.dtype) == (np.int32, np.float32)
    assert (weights == 1).all()


def test_long_prompts_come_in_chunks(tokenizer):
    ids, weights = chunk(parse("a b (c d e f g:3) h i, j a"), tokenizer)
    words = [" ".join(WORDS[i] for i in row) for row in ids]
    assert words == [
        "[BEGIN] a b c d e [END]",
        "[BEGIN] f g h i , [END]",
        "[BEGIN] j a [END] [PAD] [PAD] [PAD]",
    ]
    np.testing.assert_array_equal(weights, [[1, 1, 1, 3, 3, 3, 1], [1, 3, 3, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("a BREAK b", ["a [END] [PAD] [PAD] [PAD] [PAD]", "b [END] [PAD] [PAD] [PAD] [PAD]"]),
        ("a b c d e BREAK f", ["a b c d e [END]", "f [END] [PAD] [PAD] [PAD] [PAD]"]),
        ("a b c d e f BREAK g", [
            "a b c d e [END]", "f [END] [PAD] [PAD] [PAD] [PAD]", "g [END] [PAD] [PAD] [PAD] [PAD]"]),
        ("a BREAK", ["a [END] [PAD] [PAD] [PAD] [PAD]"]),
        ("BREAK a", ["[END] [PAD] [PAD] [PAD] [PAD] [PAD]", "a [END] [PAD] [PAD] [PAD] [PAD]"]),
    ],
)  # fmt: skip
def test_break_begins_a_chunk(prompt, rows, tokenizer):
    ids, _ = chunk(parse(prompt), tokenizer)
    assert [" ".join(WORDS[i] for i in row) for row in ids] == [f"[BEGIN] {row}" for row in rows]


def test_weights_reach_over_a_break(tokenizer):
    ids, weights = chunk(parse("a (b\nBREAK c:2) d"), tokenizer)
    assert [" ".join(WORDS[i] for i in row[1:3]) for row in ids] == ["a b", "c d"]
    np.testing.assert_array_equal(weights[:, 1:3], [[1, 2], [2, 1]])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a cat AND a dog", "AND combines several prompts"),
        ("a cat AND a dog :1.2", "AND combines several prompts"),
        ("a [cat:dog:0.5]", r"\[cat:dog:0.5\] changes between steps"),
        ("a [(red:1.3) cat:[big] dog:.25 ]", "changes between steps"),
        ("a [cat:12]", "changes between steps"),
        ("a [cat::1.0]", "changes between steps"),
        ("a ([cat|dog] x:1.2)", r"\[cat\|dog\] changes between steps"),
        ("a cat <lora:style:1>", "<lora:style:1> names a file, .* .loras, merge_lora."),
        ("<lyco:x:0.5:0.7> cat", "names a file"),
        ("<hypernet:x>", "names a file"),
        ("[red:1.3]", r"\[red:1.3\] changes between steps .* \(a:1.2\) for a weight"),
        ("a [cat:dog:1.5] b", r"\[cat:dog:1.5\] changes between steps"),
        ("[cat:-1]", "changes between steps"),
        ("a (embedding:toy-cat.pt:1.2)", "embedding:toy-cat.pt is a learned word in ComfyUI; write its name alone"),
        ("a {red|blue} cat", r"\{red\|blue\} draws one of several words"),
        ("{2$$a|b|c}", "draws one of several words"),
        ("a ${colour} cat", "is a variable in other programs"),
        ("a __animals/cats*__ b", r"__animals/cats\*__ draws a word of a list"),
        ("a cat ADDCOMM a dog", "ADDCOMM divides the picture into regions"),
        ('("a", "b").blend(0.5, 0.5)', "combines several prompts in InvokeAI"),
        ("a (red)1.3 cat", r"\)1.3 is a weight in InvokeAI and compel; write it as in \(words:1.2\)"),
        ("a (red cat)++", r"\)\+\+ is a weight"),
        ("(a:" + 400 * "9" + ")", "has a weight above 1e.06"),
        (2000 * "(" + "a", "has a weight above 1e.06"),
        ("(a:-99999999)", "has a weight above 1e.06"),
        ("a cat --ar 16:9", "--ar is an option of Midjourney"),
        (f"<lora:{'x' * 9000}>", "<lora:x* names a file"),
        (f"[{'x' * 9000}:0.5]", r"\[x* changes between steps"),
        ("a cat --iw 2", "--iw is an option of Midjourney"),
        ("a cat --no dogs", "--no is an option of Midjourney"),
    ],
)
def test_other_syntax_is_refused_in_a_line(prompt, message):
    with pytest.raises(ValueError, match=message) as raised:
        parse(prompt)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a blue++ cat", "blue++ is read as text, though it is a weight"),
        ("a (blue--, cat)", "blue-- is read as text, though it is a weight"),
        ("1.3::a cat::", "1.3:: is read as text, though it is a weight"),
        ("a cat:: -0.5 b", ":: -0.5 is read as text, though it is a weight"),
        ("a cat --foo", "--foo is read as text, though it is an option"),
        ("C++, a-b, a -- b, 16:9, std::a, ((a:1.2)), 1+", ""),
    ],
)
def test_what_may_be_other_syntax_is_text_with_one_warning(prompt, found, tokenizer, caplog):
    ids = chunked_for_each([prompt], [tokenizer, tokenizer])[0][0]
    np.testing.assert_array_equal(ids, chunked([prompt], tokenizer)[0])
    assert len(caplog.messages) == bool(found)
    assert all(message.startswith(f"prompt: {found}") for message in caplog.messages)


def test_a_prompt_has_a_most_of_chunks(tokenizer):
    """Also by BREAK alone."""
    assert chunked(["a " * 5 * MAX_CHUNKS], tokenizer)[0].shape == (1, MAX_CHUNKS, LENGTH)
    for prompt in ("a " * (5 * MAX_CHUNKS + 1), "a BREAK " * (MAX_CHUNKS + 1)):
        with pytest.raises(ValueError, match=f"has {MAX_CHUNKS + 1} chunks of 5 tokens, expected at most {MAX_CHUNKS}"):
            chunked([prompt], tokenizer)


def test_other_tokenizers_are_refused():
    with pytest.raises(ValueError, match="CLIP's tokenizer, with a start and an end token, got 1 such tokens"):
        chunk(parse("a"), word_tokenizer("$A", "[END]"))


def test_without_weights_nothing_changes(tokenizer):
    z = embed(["a b c d e", "f, (g:1)"], tokenizer)
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(["a b c d e", "f, g"])])
    np.testing.assert_array_equal(z, encode(ids))


def test_weights_multiply_and_the_mean_stays(tokenizer):
    ids, weights = (x[None] for x in chunk(parse("a (b:1.5) c [d] (e:0) f (g:2)"), tokenizer))
    plain = encode(ids)
    z = emphasise(plain, weights).reshape(plain.shape)
    np.testing.assert_allclose(z.mean(axis=(1, 2)), plain.mean(axis=(1, 2)), rtol=1e-5)
    ratio = z / plain / (z / plain)[:, :1]  # against the token that begins a chunk, of weight 1
    np.testing.assert_allclose(ratio, np.broadcast_to(weights[0][..., None], ratio.shape), rtol=1e-4, atol=1e-6)


def test_one_weight_for_all_tokens_is_none(tokenizer):
    ids, weights = (x[None] for x in chunk(parse("a (b:1.5) c"), tokenizer))
    z, other = (emphasise(encode(ids), w) for w in (weights, 3 * weights))
    np.testing.assert_allclose(z, other, rtol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch(tokenizer):
    prompts = ["a (b:1.4) c", "(c d:0.7) e f g h", ""]
    together = embed(prompts, tokenizer)
    assert together.shape == (3, 2 * LENGTH, 6)
    for i, prompt in enumerate(prompts):
        alone = embed([prompt], tokenizer)
        np.testing.assert_allclose(together[i, : alone.shape[1]], alone[0], rtol=1e-5)
    np.testing.assert_array_equal(together[0, LENGTH:], together[2, LENGTH:])  # both end in an empty chunk
    np.testing.assert_array_equal(together[2, :LENGTH], together[2, LENGTH:])


def test_each_encoder_has_its_own_tokens_weights_and_chunks():
    """The second tokenizer cuts words into letters: its chunks are more, and its weights lie elsewhere."""
    whole, letters = (word_tokenizer("[BEGIN]", "$A", "[END]") for _ in range(2))
    whole.add_tokens(["ab", "cd"])
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    (ids, weights), (of_letters, letter_weights) = chunked_for_each(["ab (cd:1.5)", "cd ab cd"], [whole, letters])
    assert ids.shape == weights.shape == of_letters.shape == letter_weights.shape == (2, 2, LENGTH)
    np.testing.assert_array_equal(weights[0, 0], [1, 1, 1.5, 1, 1, 1, 1])
    alone, alone_weights = chunked(["ab (cd:1.5)", "cd ab cd"], letters)
    np.testing.assert_array_equal(of_letters, alone)
    np.testing.assert_array_equal(letter_weights, alone_weights)
    assert 1.5 in letter_weights[0] and not np.array_equal(weights, letter_weights)
    np.testing.assert_array_equal(ids[:, 1], np.repeat(chunk([], whole)[0], 2, axis=0))
