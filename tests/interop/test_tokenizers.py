"""Tokenizers made from a checkpoint's files equal the reference's on thousands of texts."""

import gzip
import io
import json
import logging
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from diffusion_jax.interop.prompts import spelled
from diffusion_jax.interop.tokenizers import QWEN_WORDS, load_tokenizer, save_tokenizer, tokenizer_class
from diffusion_jax.models.text.encoder import tokenize

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
WORDS = """
the quick brown fox's don't I'LL we've SHE'D 12 345 6.7e8 naïve Österreich ÅNGSTRÖM İstanbul ß ẞ 日本語 中文 한국어
русский עברית العربية हिन्दी ไทย ελληνικά ꜱᴍᴀʟʟ ﬁ ½ Ⅷ ² ① 👍🏽 👨\u200d👩\u200d👧 🇯🇵 &amp; &lt;b&gt; &#39; &nbsp; <br>
é e\u0301 'S 'Re ' '' ▁ _ \\ ( ) [ ] : , . ; ! !! !cat <|startoftext|> <|endoftext|> <|ENDOFTEXT|> <|StartOfText|>
</s> <pad> <unk> <extra_id_0> <extra_id_99>
"""
SNIPPETS = WORDS.split()
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\xa0", "\u3000", "\u200b", "\u2028", "\x1c", "\x85", "\x00", "\ufeff", "", ""]


def texts(count):
    """Snippets of many writings between odd spaces, any characters of Unicode, and those of its first part."""
    draw = random.Random(0)

    def one():
        kind = draw.random()
        if kind < 0.6:
            return "".join(draw.choice(SNIPPETS) + draw.choice(SPACES) for _ in range(draw.randrange(30)))
        size, end = (20, 0x110000) if kind < 0.8 else (100, 0x3000)
        codes = (draw.randrange(end) for _ in range(draw.randrange(size)))
        return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)

    return [one() for _ in range(count)]


def token(content, normalized=False, **others):
    return {
        "content": content,
        "lstrip": False,
        "normalized": normalized,
        "rstrip": False,
        "single_word": False,
    } | others


OLD = {"bos_token": token(BOS, True), "eos_token": token(EOS, True), "unk_token": token(EOS, True)}
NEW = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS}
LISTED = {"49406": token(BOS, True, special=False), "49407": token(EOS, special=False)}
CLIP_FAMILIES = {  # special_tokens_map.json, tokenizer_config.json as published, and the token that pads
    "Stable Diffusion 1": (OLD | {"pad_token": EOS}, {**OLD, "pad_token": EOS, "model_max_length": 77}, 49407),
    "Stable Diffusion 2": (OLD | {"pad_token": "!"}, {**OLD, "pad_token": EOS, "model_max_length": 77}, 0),
    "first encoder of XL": (
        NEW | {"pad_token": EOS},
        {**NEW, "pad_token": EOS, "model_max_length": 77, "added_tokens_decoder": LISTED},
        49407,
    ),
    "second encoder of XL": (
        NEW | {"pad_token": "!"},
        {**NEW, "pad_token": "!", "model_max_length": 77, "added_tokens_decoder": {"0": token("!"), **LISTED}},
        0,
    ),
    "vocabulary alone": (None, None, 49407),
}


@pytest.fixture(scope="module")
def clip_vocabulary():
    """(vocab.json's content, lines of merges.txt) of CLIP."""
    spec = find_spec("open_clip")  # found without importing it, as it is here for its file alone
    if spec is None:
        pytest.skip("needs open-clip-torch for CLIP's vocabulary: pip install --no-deps open-clip-torch")
    path = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges), BOS, EOS]
    return {word: i for i, word in enumerate(words)}, merges


def write_folder(folder, special_tokens_map, tokenizer_config, **files):
    folder.mkdir(exist_ok=True)
    files |= {"special_tokens_map.json": special_tokens_map, "tokenizer_config.json": tokenizer_config}
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def clip_folder(tmp_path, clip_vocabulary):
    vocab, merges = clip_vocabulary

    def make(family):
        files = {"vocab.json": vocab, "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n"}
        return write_folder(tmp_path / "clip", *CLIP_FAMILIES[family][:2], **files)

    return make


def train_pieces(kind="unigram"):
    draw, model = random.Random(1), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(draw.choices(SNIPPETS, k=8)) for _ in range(2000)),
        model_writer=model, model_type=kind, vocab_size=400, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def pieces():
    """A small spiece.model in T5's layout."""
    return train_pieces()


def t5_families(pieces):
    size = sentencepiece.SentencePieceProcessor(model_proto=pieces).get_piece_size()
    roles = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    sentinels = {"additional_special_tokens": [f"<extra_id_{i}>" for i in range(100)]}
    listed = {str(i): token(name, special=True) for i, name in enumerate(["<pad>", "</s>", "<unk>"])}
    for i in range(100):
        listed[str(size + 99 - i)] = token(f"<extra_id_{i}>", special=True, lstrip=True, rstrip=True)
    old = roles | sentinels | {"extra_ids": 100, "model_max_length": 512}
    return [(None, None), (roles | sentinels, old), (roles | sentinels, old | {"added_tokens_decoder": listed})]


@pytest.fixture(scope="module")
def byte_pairs():
    """(vocab.json, merges.txt) of byte pairs of whole texts, as Qwen has them."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts(2000), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], "#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n"


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen_folder(folder, byte_pairs, **changes):
    """A folder in Qwen's layout: <think> is a token of its own, and not a special one."""
    vocab, merges = byte_pairs
    listed = {str(len(vocab) + i): token(name, special=True) for i, name in enumerate(SPECIAL)}
    listed |= {str(len(vocab) + 3 + i): token(name, special=False) for i, name in enumerate(("<think>", "</think>"))}
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": listed}
    config |= {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 131072, "unk_token": None, "bos_token": None}
    return write_folder(folder, None, config | changes, **{"vocab.json": vocab, "merges.txt": merges})


def assert_equal(folder, peer, strings):
    """Our and transformers' ids and masks of 77 tokens, ours read from the folder's own and transformers' files."""
    theirs = peer.from_pretrained(folder)
    expected = theirs(strings, padding="max_length", max_length=77, truncation=True)
    theirs.save_pretrained(folder / "saved")
    for place in (folder, folder / "saved"):
        ids, mask = tokenize(strings, load_tokenizer(place, 77), 77)
        wrong = [text for text, a, b in zip(strings, ids, expected.input_ids, strict=True) if list(a) != b]
        assert wrong == [], f"{len(wrong)} of {len(strings)} differ"
        np.testing.assert_array_equal(mask, expected.attention_mask)


@pytest.mark.parametrize("family", CLIP_FAMILIES)
def test_clip_equals_the_reference(family, clip_folder):
    transformers = pytest.importorskip("transformers")
    count = 12_000 if "of XL" in family else 2000
    assert_equal(clip_folder(family), transformers.CLIPTokenizer, texts(count))


@pytest.mark.parametrize(("family", "count"), [(0, 2000), (1, 2000), (2, 12_000)])
def test_t5_equals_the_reference(family, count, pieces, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path / "t5", *t5_families(pieces)[family], **{"spiece.model": pieces})
    assert_equal(folder, transformers.T5Tokenizer, texts(count))


@pytest.mark.parametrize("changes", [{}, {"padding_side": "left"}], ids=["as published", "padded on the left"])
def test_qwen_equals_the_reference(changes, byte_pairs, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = qwen_folder(tmp_path / "qwen", byte_pairs, **changes)
    marked = [f"<|im_start|>user\n{text}<|im_end|>\n<think>\n\n</think>\n\n" for text in texts(500)]
    assert_equal(folder, transformers.Qwen2Tokenizer, [*texts(2000), *marked])


def test_qwen(byte_pairs, tmp_path):
    """Capitals, spaces and line breaks count; no token starts or ends a text; 512 tokens at most by default."""
    tokenizer = load_tokenizer(qwen_folder(tmp_path / "qwen", byte_pairs))
    encoded = tokenizer.encode(" The  fox\n<|im_end|>")
    assert tokenizer.decode(encoded.ids) == " The  fox\n"
    first, pad = len(byte_pairs[0]), tokenizer.token_to_id("<|endoftext|>")
    assert (pad, encoded.ids[-1], tokenizer.truncation["max_length"]) == (first, pad, 512)
    assert first + 2 in encoded.ids and tokenizer.encode("").ids == [pad] * 512
    assert load_tokenizer(tmp_path / "qwen", 5).encode("the quick brown fox is quick").attention_mask == [1] * 5


@pytest.mark.parametrize("family", CLIP_FAMILIES)
def test_clip(family, clip_folder, caplog):
    pad = CLIP_FAMILIES[family][2]
    tokenizer = load_tokenizer(clip_folder(family))
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenize(["a photo of a cat", " A  Photo\nof a cat", "", "cat " * 76], tokenizer, 77)
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert ids[0].tolist() == ids[1].tolist() == cat + [pad] * 70
    assert ids[2].tolist() == [49406, 49407] + [pad] * 75
    assert ids[3].tolist() == [49406] + [2368] * 75 + [49407]
    assert mask.sum(axis=1).tolist() == [7, 7, 2, 77]
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["cut 1 of 4 prompts to 77 tokens"]


@pytest.mark.parametrize("kind", ["clip", "t5", "qwen"])
def test_a_saved_tokenizer_is_the_same_to_all_readers(kind, request, pieces, tmp_path):
    """Its class is the one that transformers reads it by."""
    transformers = pytest.importorskip("transformers")
    if kind == "clip":
        first, expected = load_tokenizer(request.getfixturevalue("clip_folder")("Stable Diffusion 2")), "CLIPTokenizer"
    elif kind == "qwen":
        folder = qwen_folder(tmp_path / "qwen", request.getfixturevalue("byte_pairs"))
        first, expected = load_tokenizer(folder, 77), "Qwen2TokenizerFast"
    else:
        folder = write_folder(tmp_path / "t5", *t5_families(pieces)[0], **{"spiece.model": pieces})
        first, expected = load_tokenizer(folder, 77), "T5TokenizerFast"
    save_tokenizer(first, tmp_path / "saved")
    assert tokenizer_class(first) == expected
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["tokenizer_class"] == expected
    strings = texts(300)
    assert_equal(tmp_path / "saved", getattr(transformers, expected), strings)
    again = load_tokenizer(tmp_path / "saved")
    assert [e.ids for e in again.encode_batch(strings)] == [e.ids for e in first.encode_batch(strings)]


def test_where_an_exclamation_mark_pads_it_does_so_everywhere(clip_folder):
    first, second = (load_tokenizer(clip_folder(name)).encode("cat!").ids[:4] for name in list(CLIP_FAMILIES)[:2])
    assert (first, second) == ([49406, 2368, 256, 49407], [49406, 2368, 0, 49407])


ADDED = {"<cat-toy>": 49408, "<Style>": 49409, BOS: 49406, EOS: 49407}


@pytest.mark.parametrize("place", ["added_tokens.json", "with special_tokens_map.json", "tokenizer_config.json"])
def test_learned_words_are_one_token_wherever_they_are_listed(place, clip_folder):
    transformers = pytest.importorskip("transformers")
    folder = clip_folder("Stable Diffusion 1")
    if place == "tokenizer_config.json":
        listed = {str(i): token(content, special=False) for content, i in ADDED.items()}
        config = {**NEW, "pad_token": EOS, "model_max_length": 77, "added_tokens_decoder": listed}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    if place == "with special_tokens_map.json":
        roles = OLD | {"pad_token": EOS, "additional_special_tokens": ["<Style>", "<new>"]}
        (folder / "special_tokens_map.json").write_text(json.dumps(roles))
    ids = load_tokenizer(folder).encode("a <cat-toy> cat").ids[:5]
    assert ids == [49406, 320, 49408, 2368, 49407]
    strings = [f"{text} <cat-toy>, <style> <Style>cat <new> {text}" for text in texts(100)]
    assert_equal(folder, transformers.CLIPTokenizer, [*strings, "<cat-toy>s in <STYLE>", "cat<cat-toy>!"])


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_a_word_of_a_folder_stands_for_all_its_vectors(place, clip_folder):
    folder, words = clip_folder("Stable Diffusion 1"), {"<dog>": 49408, "<dog>_1": 49409}
    if place == "added_tokens.json":
        (folder / place).write_text(json.dumps(words))
    else:
        listed = {str(i): token(content, special=False) for content, i in words.items()}
        (folder / place).write_text(json.dumps({**NEW, "added_tokens_decoder": listed}))
    assert spelled("a <dog> cat", load_tokenizer(folder)).split() == ["a", "<dog>", "<dog>_1", "cat"]


def test_words_beside_tokenizer_json(clip_folder):
    """Of an older transformers that wrote both."""
    transformers = pytest.importorskip("transformers")
    folder = clip_folder("Stable Diffusion 1")
    load_tokenizer(folder).save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    assert load_tokenizer(folder).encode("a <cat-toy> cat").ids[:5] == [49406, 320, 49408, 2368, 49407]
    expected = transformers.CLIPTokenizer.from_pretrained(folder)("a <cat-toy> cat").input_ids
    assert expected == [49406, 320, 49408, 2368, 49407]


def test_added_tokens_whose_ids_are_not_the_next_ones_are_refused(clip_folder):
    folder = clip_folder("Stable Diffusion 1")
    (folder / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49410}))
    with pytest.raises(ValueError, match=r"'<cat-toy>' has the id 49410, and the next free one is 49408"):
        load_tokenizer(folder)


def test_t5_equals_sentencepiece(pieces, tmp_path):
    """On the words that both normalize alike, without those that are special to T5."""
    draw, words = random.Random(2), [word for word in SNIPPETS if "<" not in word]
    plain = ["  ".join(draw.choices(words, k=draw.randrange(20))) for _ in range(2000)]
    tokenizer = load_tokenizer(write_folder(tmp_path / "t5", None, None, **{"spiece.model": pieces}), 2000)
    model = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    ids, mask = tokenize(plain, tokenizer, 2000)
    assert [list(row[real]) for row, real in zip(ids, mask, strict=True)] == [[*model.encode(t), 1] for t in plain]
    assert (ids[~mask] == 0).all()


def test_lengths(pieces, tmp_path):
    def length(config, **arguments):
        folder = write_folder(tmp_path / "t5", None, config, **{"spiece.model": pieces})
        return load_tokenizer(folder, **arguments).truncation["max_length"]

    assert [length(None), length({"model_max_length": 300}), length({"model_max_length": 10**30})] == [512, 300, 512]
    assert length({"model_max_length": 300}, length=20) == 20
    with pytest.raises(ValueError, match=r"length: expected more than 1 tokens, .* got 1"):
        length(None, length=1)


@pytest.mark.parametrize(
    "config",
    [{"model_max_length": None}, {"model_max_length": "long"}, {"eos_token": 5}, {"added_tokens_decoder": None}],
)
def test_settings_of_another_type_are_one_line(config, pieces, tmp_path):
    folder = write_folder(tmp_path / "t5", None, config, **{"spiece.model": pieces})
    with pytest.raises(ValueError, match="expected the files of a CLIP, T5, BERT or Qwen tokenizer, but") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": "{}"}, "malformed|expected the files of a CLIP, T5, BERT or Qwen tokenizer"),
        (
            {"vocab.json": {"a": 0}, "merges.txt": "#version\na b\n"},
            "expected the files of a CLIP, T5, BERT or Qwen tokenizer",
        ),
        ({"vocab.json": {"a": 0}, "merges.txt": ""}, "but vocab.json lacks 255 of the 256 bytes"),
        ({"vocab.json": "[", "merges.txt": ""}, "vocab.json: expected JSON"),
        ({"spiece.model": b"no model"}, "expected the files of a CLIP, T5, BERT or Qwen tokenizer"),
        ({"spiece.model": b""}, "expected the files of a CLIP, T5, BERT or Qwen tokenizer"),
    ],
)
def test_malformed_files_are_one_line(files, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write_folder(tmp_path / "wrong", None, None, **files))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_other_piece_models_are_refused(tmp_path):
    folder = write_folder(tmp_path / "bpe", None, None, **{"spiece.model": train_pieces("bpe")})
    with pytest.raises(ValueError, match="not a unigram model"):
        load_tokenizer(folder)


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer\.json, .* or vocab\.txt"):
        load_tokenizer(tmp_path)
