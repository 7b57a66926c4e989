"""The condition of a denoiser: none, a class, or a text; and its "no condition"."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import conditioning
from diffusion_jax.models.text.embedding import mean_of_tokens
from diffusion_jax.models.text.encoder import TextEmbedding, TextEncoder


def letters(length=4):
    """A text encoder whose embedding is each letter's number and its square."""

    def tokenize(prompts, warn):
        ids = np.array([[ord(c) for c in prompt[:length].ljust(length, "\0")] for prompt in prompts], np.int32)
        return ids.reshape(-1, length), ids.reshape(-1, length) > 0

    def apply(params, ids, mask):
        tokens = params["gain"] * np.float32(1) * (ids[..., None] ** np.array([1, 2]))
        return TextEmbedding(tokens, mean_of_tokens(tokens, mask))

    return TextEncoder(tokenize, apply, {"gain": np.float32(1)}, length, 2)


def of_texts(*encoders, **settings):
    return conditioning.text(lambda: encoders, lambda: "", **settings)


def test_classes_are_numbers():
    classes = conditioning.class_labels(10)
    assert classes.of_prompts(["3", " 7 "])["label"].tolist() == [3, 7]
    assert classes.of_records({"label": np.array([1, 2]), "image": None})["label"].tolist() == [1, 2]
    assert classes.null["label"] == 10, "a class of its own, after the others"


@pytest.mark.parametrize("prompt", ["cat", "10", "-1", "1.5", ""])
def test_a_wrong_class_is_one_clear_line(prompt):
    with pytest.raises(ValueError, match=r"expected a number in 0\.\.9") as error:
        conditioning.class_labels(10).of_prompts(["3", prompt])
    assert repr(prompt) in str(error.value) and "\n" not in str(error.value)


def test_nothing_is_told_without_a_condition():
    nothing = conditioning.unconditional()
    assert nothing.of_prompts(["a", "b"]) == nothing.of_records({"image": None}) == nothing.null == {}


def test_texts_of_records_and_of_prompts_are_one():
    texts = of_texts(letters())
    captions = np.array(["ab", "abcdef"], object)
    of_records = texts.embed(texts.params(), texts.of_records({"caption": captions, "image": None}))
    of_prompts = texts.of_prompts(list(captions))
    for name, shape in {"text": (2, 4, 2), "mask": (2, 4)}.items():
        assert of_records[name].shape == shape
        np.testing.assert_array_equal(of_records[name], of_prompts[name])
    assert of_records["text"][0, :, 0].tolist() == [97, 98, 0, 0] and of_records["mask"][0].tolist() == [
        True,
        True,
        False,
        False,
    ]


def test_no_text_is_the_empty_text():
    texts = of_texts(letters())
    empty = texts.of_prompts([""])
    for name in ("text", "mask"):
        np.testing.assert_array_equal(texts.null[name], empty[name][0])


def test_one_vector_for_the_whole_text():
    """It does not see padding, and is as long for every text."""
    texts = of_texts(letters()._replace(pooled=True))
    cond = texts.of_prompts(["ab", "abcdef", ""])
    assert cond["text_embeds"].shape == (3, 2)
    mean = np.array([97 + 98, 97**2 + 98**2])
    np.testing.assert_allclose(cond["text_embeds"][0], mean / np.sqrt(np.mean(mean**2)), rtol=1e-5)
    np.testing.assert_allclose(np.mean(cond["text_embeds"][:2] ** 2, axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(cond["text_embeds"][2], 0)
    again = texts.embed(texts.params(), texts.of_records({"caption": np.array(["ab", "abcdef"], object)}))
    np.testing.assert_array_equal(again["text_embeds"], cond["text_embeds"][:2])


@pytest.mark.parametrize("on_tokens", [False, True])
def test_several_encoders_join(on_tokens):
    encoders = letters()._replace(pooled=True), letters(6 if on_tokens else 4), letters()._replace(pooled=True)
    if on_tokens:  # a wider one
        apply = encoders[1].apply
        encoders = (
            encoders[0],
            encoders[1]._replace(apply=lambda *inputs: TextEmbedding(jnp.repeat(apply(*inputs).tokens, 2, -1), None)),
            encoders[2],
        )
    texts = of_texts(*encoders, on_tokens=on_tokens)
    cond, alone = texts.of_prompts(["ab", "abcdef"]), of_texts(encoders[0]).of_prompts(["ab", "abcdef"])
    assert cond["text_embeds"].shape == (2, 4)
    np.testing.assert_allclose(cond["text_embeds"], np.tile(alone["text_embeds"], 2))
    if on_tokens:
        assert cond["text"].shape == (2, 14, 4) and cond["mask"].sum(1).tolist() == [6, 14]
        np.testing.assert_array_equal(cond["text"][:, :4], np.pad(alone["text"], ((0, 0), (0, 0), (0, 2))))
        np.testing.assert_array_equal(cond["text"][:, 10:], cond["text"][:, :4])
    else:
        np.testing.assert_array_equal(cond["text"], np.tile(alone["text"], 3))
        np.testing.assert_array_equal(cond["mask"], alone["mask"])
    of_records = texts.embed(texts.params(), texts.of_records({"caption": np.array(["ab", "abcdef"], object)}))
    jax.tree.map(np.testing.assert_array_equal, of_records, cond)


def test_encoders_of_different_lengths_do_not_join_token_by_token():
    with pytest.raises(ValueError, match="need the same length, got 4 and 6 tokens"):
        of_texts(letters(4), letters(6))


def test_no_text_can_be_zeros():
    null = of_texts(letters()._replace(pooled=True), null_is_zeros=True).null
    assert not null["text"].any() and not null["text_embeds"].any() and null["mask"].all()


def test_prompts_that_are_kept_and_records_that_are_embedded_need_no_encoder():
    expected = of_texts(letters())
    known = {prompt: expected.of_prompts([prompt]) for prompt in ("", "ab")}

    def keep(of_prompts):
        def of(prompts):
            return known[prompts[0]] if prompts[0] in known else of_prompts(prompts)

        return of

    loads = []
    texts = conditioning.text(lambda: loads.append(1) or [letters()], lambda: "", keep=keep)
    jax.tree.map(np.testing.assert_array_equal, texts.null, expected.null)
    jax.tree.map(np.testing.assert_array_equal, texts.embed(None, texts.of_prompts(["ab"])), known["ab"])
    assert not loads
    for _ in range(2):
        new = texts.of_prompts(["abc"])
        jax.tree.map(np.testing.assert_array_equal, new, expected.of_prompts(["abc"]))
    assert texts.params() == (letters().params,) and loads == [1]
