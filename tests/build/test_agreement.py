"""What is said about parts that fit together, but not in all of what they have."""

import logging

import numpy as np
from ml_collections import ConfigDict

from diffusion_jax import build, conditioning
from diffusion_jax.build import fields, records
from diffusion_jax.data.sources import Source
from tests.interop.test_encoders import saved, write_tokenizer


def captioned(captions):
    return Source("pictures", len(captions), lambda index: {}, captions=captions)


def test_captions_that_are_cut_are_counted_once_for_each_encoder(tmp_path, caplog):
    folders = [tmp_path / "a" / "text_encoder", tmp_path / "b" / "text_encoder"]
    for folder in folders:
        saved("CLIPTextModel", folder)
        write_tokenizer(folder.parent / "tokenizer", "bpe", ["<s>", "$A", "</s>"])
    absent = str(tmp_path / "absent")
    listed = (f"{folders[0]}@length=4", str(folders[1]), absent)
    section = fields.section(fields.CONDITION, kind="text", encoders=listed, length=6)
    tokenizers = build.encoders.tokenizers(section)
    assert list(tokenizers) == [str(folder) for folder in folders]
    texts = conditioning.unconditional()._replace(tokenizers=lambda: tokenizers)
    records.tell_cut_captions(texts, captioned(["a b", "a b c", ("a b c d e", "a"), ""]))
    assert [record.getMessage() for record in caplog.records] == [
        f"2 of 4 sampled captions are longer than 4 tokens of {folders[0]}, and are cut",
        f"1 of 4 sampled captions are longer than 6 tokens of {folders[1]}, and are cut",
    ]
    caplog.clear()
    records.tell_cut_captions(texts, captioned(["a b"] * 3))
    records.tell_cut_captions(texts, Source("a", 1, lambda index: {}))
    records.tell_cut_captions(conditioning.unconditional(), captioned(["a b c d e f"]))
    assert not caplog.records
    records.tell_cut_captions(texts, captioned(["a b"] * 3000 + ["a b c d e"] * 2000))
    assert "400 of 1000 sampled captions" in caplog.text


def test_captions_of_records_are_cut_without_a_line_for_each_batch(caplog):
    config = ConfigDict({"condition": {"kind": "text", "encoders": ("minilm",), "length": 4}})
    texts = build.model.conditioning(config)
    with caplog.at_level(logging.WARNING):
        inputs = texts.of_records({"caption": ["a cat and a dog"]})
    assert np.shape(inputs["0"]["ids"]) == (1, 4) and not caplog.records
    texts.of_prompts(["a cat and a dog"])
    assert "cut 1 of 1 prompts to 4 tokens" in caplog.text
