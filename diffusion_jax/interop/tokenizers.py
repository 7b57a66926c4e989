"""Tokenizers of CLIP, T5, BERT and Qwen from the tokenizer folder of a checkpoint."""

import itertools
import tempfile

from sentencepiece import sentencepiece_model_pb2
from tokenizers import (
    AddedToken,
    BertWordPieceTokenizer,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from diffusion_jax import paths
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.messages import first_line
from diffusion_jax.paths import Path

# Special tokens that transformers uses if a folder does not name them.
CLIP_ROLES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
T5_ROLES = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BERT_ROLES = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
QWEN_ROLES = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
FILES = ("tokenizer.json", "vocab.json", "spiece.model", "vocab.txt")  # a folder of a tokenizer has one of them
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
ALL_FILES = (*FILES, "merges.txt", *SETTINGS)
SPECIAL_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# CLIP's words: its start and end token, English endings, runs of letters, single digits, runs of other characters.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# Qwen's: English endings, a run of letters with the sign before it, single digits, runs of other signs, of line breaks,
# of spaces. Nothing is left out, and a space belongs to the word after it.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UNKNOWN_LENGTH = 10**6  # transformers writes a larger number if the length is unknown


def load_tokenizer(folder: str | Path, length: int | None = None) -> Tokenizer:
    """The tokenizer of a folder. It cuts and pads every prompt to `length` tokens, with start and end token.

    It is read from tokenizer.json, or built from vocab.json and merges.txt (byte pairs: those of CLIP, Radford et al.
    2021, and of Qwen, Yang et al. 2025), spiece.model (T5, Raffel et al. 2020: the unigram model of Kudo 2018) or
    vocab.txt (BERT, Devlin et al. 2019).
    tokenizer_config.json and special_tokens_map.json name the padding token: the end token in OpenAI's CLIP, "!" in
    OpenCLIP. Special tokens are recognised anywhere in a prompt, so every "!" becomes padding there. The reference does
    the same, and the networks were trained with it. So are added tokens, such as learned words, in
    tokenizer_config.json, or in added_tokens.json of older versions of transformers.

    length: None is model_max_length of tokenizer_config.json, else 77 for CLIP and 512 for others; of Qwen, whose
      model_max_length is that of a conversation, at most 512.
    Raises FileNotFoundError for a folder without a tokenizer, and ValueError for malformed files or too small a length.
    """
    folder = paths.fetched(folder)
    try:
        settings = _settings(folder)
        tokenizer, roles, default_length = _build(folder, settings)
        pad = _add_special_tokens(tokenizer, settings, roles)
        if length is None:
            model_max_length = int(settings.get("model_max_length", UNKNOWN_LENGTH))
            length = model_max_length if model_max_length < UNKNOWN_LENGTH else default_length
            length = min(length, default_length) if roles is QWEN_ROLES else length
        side = settings.get("padding_side", "right")
    except FileNotFoundError:
        raise
    except Exception as error:  # each file format fails in its own way
        reason = first_line(error)
        raise ValueError(f"{folder}: expected the files of a CLIP, T5, BERT or Qwen tokenizer, but {reason}") from None

    num_special_tokens = tokenizer.num_special_tokens_to_add(is_pair=False)
    if length <= num_special_tokens:
        raise ValueError(
            f"length: expected more than {num_special_tokens} tokens, the number of start and end tokens, got {length}"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(direction=side, length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer of `load_tokenizer` to a folder that it and transformers read.

    Of byte pairs, also vocab.json with merges.txt for readers that support only those.
    """
    folder, unknown = paths.at(folder), T5_ROLES["unk_token"]
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(f"{temporary}/tokenizer.json")
        if isinstance(tokenizer.model, models.BPE):
            tokenizer.model.save(temporary)
            unknown = tokenizer.model.unk_token
        paths.copy_into(folder, temporary)
    ends = tokenizer.encode("").tokens[: tokenizer.num_special_tokens_to_add(is_pair=False)]
    names = ("bos_token", "eos_token")[2 - len(ends) :]
    roles = {"unk_token": unknown, "pad_token": tokenizer.padding["pad_token"]} | dict(zip(names, ends, strict=True))
    length = tokenizer.truncation["max_length"]
    settings = {"tokenizer_class": tokenizer_class(tokenizer), "model_max_length": length}
    settings |= {"padding_side": tokenizer.padding["direction"]} | {name: role for name, role in roles.items() if role}
    write_json(folder / "tokenizer_config.json", settings)


def tokenizer_class(tokenizer: Tokenizer) -> str:
    """The name of a tokenizer's class in transformers."""
    if isinstance(tokenizer.model, models.BPE):
        return "Qwen2TokenizerFast" if _is_qwen(tokenizer) else "CLIPTokenizer"
    return {models.WordPiece: "BertTokenizerFast"}.get(type(tokenizer.model), "T5TokenizerFast")


def _is_qwen(tokenizer):
    """Whether its byte pairs are those of whole texts: the last one of a word has no ending of its own."""
    return isinstance(tokenizer.model, models.BPE) and not tokenizer.model.end_of_word_suffix


def _settings(folder):
    """tokenizer_config.json, with the added tokens of the files beside it in `added_tokens_decoder`, by id.

    Older versions of transformers list them in added_tokens.json, and special_tokens_map.json then counts.
    """
    config, tokens, added = (read_json(folder / name) if (folder / name).is_file() else {} for name in SETTINGS)
    if "added_tokens_decoder" in config:
        return config
    settings = config | tokens
    # as in the reference, which does not count additional_special_tokens here
    special = {_content(token) for token in _special_tokens({**settings, "additional_special_tokens": []}, {})}
    listed = {i: {"content": content, "normalized": content not in special} for content, i in added.items()}
    return settings | {"added_tokens_decoder": listed}


def _build(folder, settings):
    """(tokenizer with only the special tokens of its files, default roles, default length)."""
    tokenizer_file, vocab, pieces, words = (folder / name for name in FILES)
    merges = folder / "merges.txt"
    if tokenizer_file.is_file():
        tokenizer = Tokenizer.from_str(tokenizer_file.read_text(encoding="utf-8"))
    elif vocab.is_file() and merges.is_file():
        vocab, lines = read_json(vocab), merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split()) for line in lines["#version" in lines[0] :] if line]
        is_clip = any(word.endswith("</w>") for word in vocab)
        tokenizer = _clip(vocab, pairs, settings) if is_clip else _qwen(vocab, pairs)
    elif pieces.is_file():
        tokenizer = _t5(pieces.read_bytes(), settings)
    elif words.is_file():
        tokenizer = _bert(words, settings)
    else:
        raise FileNotFoundError(
            f"{folder}: expected tokenizer.json, vocab.json with merges.txt, spiece.model or vocab.txt there"
        )
    if _is_qwen(tokenizer):
        return tokenizer, QWEN_ROLES, 512
    roles, length = {models.BPE: (CLIP_ROLES, 77), models.WordPiece: (BERT_ROLES, 512)}.get(
        type(tokenizer.model), (T5_ROLES, 512)
    )
    return tokenizer, roles, length


def _bert(words, settings):
    """Pieces of words; those inside a word begin with "##"."""
    lowercase = settings.get("do_lower_case", True)
    strip_accents = settings.get("strip_accents")
    return BertWordPieceTokenizer(str(words), lowercase=lowercase, strip_accents=strip_accents)._tokenizer


def _qwen(vocab, pairs):
    """Byte pairs of whole texts, with their spaces and capitals. No token starts or ends a text."""
    if missing := set(pre_tokenizers.ByteLevel.alphabet()) - vocab.keys():
        raise ValueError(f"vocab.json lacks {len(missing)} of the 256 bytes")
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _clip(vocab, pairs, settings):
    """Byte pairs of lower-case words. The last piece of a word ends in "</w>"."""
    bos, eos, unk = (
        _content(settings.get(role) or CLIP_ROLES[role]) for role in ("bos_token", "eos_token", "unk_token")
    )
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token=unk, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos], special_tokens=[(bos, vocab[bos]), (eos, vocab[eos])]
    )
    return tokenizer


def _t5(model, settings):
    """The most likely pieces of words, which begin with "▁", then the end token. Training sentinels come last."""
    model = sentencepiece_model_pb2.ModelProto.FromString(model)
    if model.trainer_spec.model_type != model.trainer_spec.UNIGRAM:
        raise ValueError("spiece.model is not a unigram model")
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(settings.get("extra_ids", 100)))]
    vocab = [(piece.piece, piece.score) for piece in model.pieces] + sentinels
    tokenizer = Tokenizer(models.Unigram(vocab, model.trainer_spec.unk_id))
    if model.normalizer_spec.precompiled_charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    eos = _content(settings.get("eos_token") or T5_ROLES["eos_token"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", eos], special_tokens=[(eos, tokenizer.token_to_id(eos))]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name, _ in sentinels])
    return tokenizer


def _add_special_tokens(tokenizer, settings, roles):
    """Make the tokenizer recognise added and special tokens anywhere. Returns the padding token."""
    special_tokens = _special_tokens(settings, roles)
    special_names = {_content(token) for token in special_tokens}
    for i, token in sorted(settings["added_tokens_decoder"].items(), key=lambda entry: int(entry[0])):
        is_special = _content(token) in special_names or (isinstance(token, dict) and token.get("special", False))
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([_added(token)])
        found = tokenizer.token_to_id(_content(token))
        if found != int(i):
            raise ValueError(f"the added token {_content(token)!r} has the id {i}, and the next free one is {found}")
    known_tokens = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_special_tokens([_added(token) for token in special_tokens if _content(token) not in known_tokens])
    return _content(settings.get("pad_token") or roles["pad_token"])


def _special_tokens(settings, roles):
    """The special tokens, in the order in which they get ids if they have none. roles: default values."""
    named = [settings.get(role) or roles.get(role) for role in SPECIAL_ROLES]
    extra = [settings.get(field) or [] for field in ("additional_special_tokens", "extra_special_tokens")]
    lists = [tokens.values() if isinstance(tokens, dict) else tokens for tokens in extra]
    return [token for token in itertools.chain(named, *lists) if token]


def _added(token):
    if isinstance(token, str):
        return AddedToken(token, normalized=False)
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(token["content"], **{flag: token[flag] for flag in flags if flag in token})


def _content(token):
    return token if isinstance(token, str) else token["content"]
