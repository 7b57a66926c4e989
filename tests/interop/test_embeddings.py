"""Learned words: every file format, the tokens and rows they become, and the text embeddings of diffusers."""

import numpy as np
import pytest

from diffusion_jax.interop import load_pipeline, save_pipeline
from diffusion_jax.interop.embeddings import add_embeddings
from diffusion_jax.interop.families import stable_diffusion_xl
from diffusion_jax.interop.prompts import chunked, learned_words
from diffusion_jax.interop.tensors import write_file
from diffusion_jax.interop.tokenizers import load_tokenizer
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.pipelines.published import from_published
from tests.interop.test_pipeline import TEXT, TEXT_2, filled, our_pipeline, published, vocabulary  # noqa: F401

WIDTH, WIDTH_2 = TEXT["hidden_size"], TEXT_2["hidden_size"]
ONE, TWO = (np.random.default_rng(i).normal(size=(i, WIDTH)).astype(np.float32) for i in (1, 2))
GRAND = np.random.default_rng(3).normal(size=(2, WIDTH_2)).astype(np.float32)


@pytest.fixture(scope="module")
def pipeline(vocabulary):  # noqa: F811
    return our_pipeline(tokenizers=(load_tokenizer(vocabulary),))


@pytest.fixture(scope="module")
def of_two(vocabulary):  # noqa: F811
    second = ClipTextEncoder(**TEXT_2)
    return our_pipeline(
        {"text_encoder_2": filled(second, *second.example_inputs())},
        stable_diffusion_xl.FAMILY,
        tokenizers=(load_tokenizer(vocabulary),) * 2,
    )


def rows(pipeline, prompt, encoder=0):
    """The token embeddings that a text encoder looks up for a prompt, without start and end token."""
    part, tokenizer = pipeline.text_encoders[encoder], pipeline.tokenizers[encoder]
    (ids,), _ = chunked([prompt], tokenizer)
    table = np.asarray(part.params["params"]["text_model"]["embeddings"]["token_embedding"]["embedding"])
    assert len(table) == part.module.vocab_size
    end = tokenizer.encode("").ids[1]
    return table[[i for i in ids.reshape(-1)[1:] if i != end and i != ids[0, 0]]]


def in_prompt(before, vectors, pipeline, encoder=0):
    """What "a WORD b" looks up if WORD stands for the vectors."""
    a, b = (rows(before, letter, encoder) for letter in "ab")
    return np.concatenate([a, vectors, b])


FILES = {  # a file, its content, the prompt's word and its vectors
    "one vector": ("x", {"<toy>": ONE[0]}, "<toy>", ONE),
    "several vectors": ("x", {"<toy>": TWO}, "<toy>", TWO),
    "the name of the file": ("toy-cat", {"emb_params": TWO}, "toy-cat", TWO),
    "the name of the file, from a pickle": ("toy", {"*": TWO}, "toy", TWO),
    "and with the name of its dict": ("toy", {"string_to_param.*": TWO}, "toy", TWO),
    "half precision": ("toy", {"emb_params": TWO.astype(np.float16)}, "toy", TWO.astype(np.float16)),
}


@pytest.mark.parametrize("case", FILES)
def test_a_word_stands_for_its_vectors(case, pipeline, tmp_path):
    stem, held, word, vectors = FILES[case]
    write_file(tmp_path / f"{stem}.safetensors", held)
    after = add_embeddings(pipeline, tmp_path / f"{stem}.safetensors")
    np.testing.assert_array_equal(rows(after, f"a {word} b"), in_prompt(pipeline, vectors, pipeline))
    np.testing.assert_array_equal(rows(after, f"a ({word.upper()}:1.3) b"), in_prompt(pipeline, vectors, pipeline))
    assert pipeline.tokenizers[0].token_to_id(word) is None  # the pipeline before is as it was


@pytest.mark.parametrize("container", ["dict", "ParameterDict"])
def test_pickles_of_web_interfaces(container, pipeline, tmp_path):
    """Their word is the name of the file; diffusers takes the name inside."""
    torch = pytest.importorskip("torch")
    vectors = torch.nn.Parameter(torch.tensor(TWO))
    held = {"*": vectors} if container == "dict" else torch.nn.ParameterDict({"*": vectors})
    content = {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held, "name": "inside", "step": 3}
    torch.save(content | {"sd_checkpoint": None}, tmp_path / "outside.pt")
    after = add_embeddings(pipeline, tmp_path / "outside.pt", allow_pickle=True)
    for word in ("inside", "outside"):
        np.testing.assert_array_equal(rows(after, f"a {word} b"), in_prompt(pipeline, TWO, pipeline))
    renamed = add_embeddings(pipeline, tmp_path / "outside.pt", "mine", allow_pickle=True)
    np.testing.assert_array_equal(rows(renamed, "a mine b"), in_prompt(pipeline, TWO, pipeline))
    assert len(rows(renamed, "inside")) == len("inside")
    with pytest.raises(ValueError, match="is a pickle"):
        add_embeddings(pipeline, tmp_path / "outside.pt")


def test_the_name_inside_is_left_out_where_it_cannot_be_used(pipeline, tmp_path):
    """It is that of the file in other letters, a word that exists, or a token of the vocabulary."""
    torch = pytest.importorskip("torch")
    piece = next(word for word in pipeline.tokenizers[0].get_vocab() if word.isalpha() and len(word) == 1)
    after = pipeline
    for stem, inside in (("easyone", "EasyOne"), ("a_v1", "style1"), ("a_v2", "style1"), ("letter", piece)):
        held = {"string_to_param": {"*": torch.tensor(ONE)}, "name": inside}
        torch.save(held, tmp_path / f"{stem}.pt")
        after = add_embeddings(after, tmp_path / f"{stem}.pt", allow_pickle=True)
        np.testing.assert_array_equal(rows(after, f"a {stem} b"), in_prompt(pipeline, ONE, pipeline))
    np.testing.assert_array_equal(rows(after, piece), rows(pipeline, piece))
    with pytest.raises(ValueError, match="is a token of the model already"):
        add_embeddings(pipeline, tmp_path / "letter.pt", piece, allow_pickle=True)
    torch.save({"string_to_param": {"a": torch.tensor(ONE), "b": torch.tensor(ONE)}}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match="expected one learned word in string_to_param, got 2"):
        add_embeddings(pipeline, tmp_path / "two.pt", allow_pickle=True)


def test_other_pickles(pipeline, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"<toy>": torch.tensor(ONE[0])}, tmp_path / "learned_embeds.bin")
    torch.save(torch.tensor(TWO), tmp_path / "bare.pt")
    after = add_embeddings(pipeline, tmp_path / "learned_embeds.bin", allow_pickle=True)
    after = add_embeddings(after, tmp_path / "bare.pt", allow_pickle=True)
    np.testing.assert_array_equal(rows(after, "a <toy> b"), in_prompt(pipeline, ONE, pipeline))
    np.testing.assert_array_equal(rows(after, "a bare b"), in_prompt(pipeline, TWO, pipeline))


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_two_encoders_have_vectors_of_their_own(names, of_two, tmp_path):
    write_file(tmp_path / "toy.safetensors", dict(zip(names, (TWO, GRAND), strict=True)))
    after = add_embeddings(of_two, tmp_path / "toy.safetensors")
    for encoder, vectors in enumerate((TWO, GRAND)):
        np.testing.assert_array_equal(rows(after, "a toy b", encoder), in_prompt(of_two, vectors, of_two, encoder))


def test_embeddings_of_pivotal_tuning_are_safetensors_with_another_ending(of_two, tmp_path):
    write_file(tmp_path / "embeddings.pti", {"text_encoders_0": TWO, "text_encoders_1": GRAND})
    after = add_embeddings(of_two, tmp_path / "embeddings.pti", "TOK")
    np.testing.assert_array_equal(rows(after, "a TOK b", 1), in_prompt(of_two, GRAND, of_two, 1))


def test_text_encoders_get_as_many_vectors(of_two, tmp_path):
    """Their tokens stand side by side."""
    write_file(tmp_path / "toy.safetensors", {"clip_l": ONE, "clip_g": GRAND})
    with pytest.raises(ValueError, match="as many vectors for each text encoder, got 2 of clip_g, 1 of clip_l"):
        add_embeddings(of_two, tmp_path / "toy.safetensors")


@pytest.mark.parametrize("word", ["[V]", "(x)", "a:b", "toy (v2)", "back\\slash", "<[x]>"])
def test_a_word_may_have_the_signs_of_weights(word, pipeline, tmp_path):
    """Its brackets are no weights, with backslashes or without."""
    write_file(tmp_path / "x.safetensors", {word: TWO})
    after = add_embeddings(pipeline, tmp_path / "x.safetensors")
    expected = in_prompt(pipeline, TWO, pipeline)
    with_backslashes = "".join(f"\\{letter}" if letter in "()[]\\" else letter for letter in word)
    for text in (word, f"({word}:1.3)", f"[{word}]", word.lower(), with_backslashes):
        np.testing.assert_array_equal(rows(after, f"a {text} b"), expected)
    _, weights = chunked([f"(a {word}:1.5) b"], after.tokenizers[0])
    np.testing.assert_allclose(weights[0, 0, 1:5], [1.5, 1.5, 1.5, 1])


def test_a_word_is_not_cut_between_chunks(pipeline, tmp_path):
    """As in web interfaces: what does not fit into a chunk begins the next one."""
    write_file(tmp_path / "cat.safetensors", {"emb_params": TWO})
    after = add_embeddings(pipeline, tmp_path / "cat.safetensors")
    tokenizer = after.tokenizers[0]
    room = len(tokenizer.encode("").ids) - 2
    cat = [tokenizer.token_to_id(name) for name in ("cat", "cat_1")]
    for before, place in ((room - 2, (0, room - 1)), (room - 1, (1, 1)), (room, (1, 1)), (room + 1, (1, 2))):
        (ids,), _ = chunked([f"{'a ' * before}cat b"], tokenizer)
        chunk, start = place
        np.testing.assert_array_equal(ids[chunk, start : start + 2], cat)
        assert [*ids.reshape(-1)].count(cat[1]) == 1


def test_a_word_longer_than_a_chunk_is_cut(pipeline, tmp_path):
    room = len(pipeline.tokenizers[0].encode("").ids) - 2
    vectors = np.random.default_rng(0).normal(size=(room + 1, WIDTH)).astype(np.float32)
    write_file(tmp_path / "cat.safetensors", {"emb_params": vectors})
    after = add_embeddings(pipeline, tmp_path / "cat.safetensors")
    np.testing.assert_array_equal(rows(after, "a cat b")[1 : room + 2], vectors)


def test_a_word_is_no_part_of_another(pipeline, tmp_path):
    write_file(tmp_path / "cat.safetensors", {"emb_params": TWO})
    after = add_embeddings(pipeline, tmp_path / "cat.safetensors")
    np.testing.assert_array_equal(rows(after, "a category"), rows(pipeline, "a category"))
    np.testing.assert_array_equal(rows(after, "cat, cat")[[0, 1, -2, -1]], np.concatenate([TWO, TWO]))


def test_the_end_of_a_text_stays_where_configs_call_it_the_largest_id(pipeline, tmp_path):
    import jax.numpy as jnp

    part = pipeline.parts["text_encoder"]
    old = pipeline._replace(
        parts={**pipeline.parts, "text_encoder": part._replace(module=part.module.clone(eos_token_id=2))}
    )
    write_file(tmp_path / "cat.safetensors", {"emb_params": TWO})
    after = add_embeddings(old, tmp_path / "cat.safetensors")
    (ids,), _ = chunked(["a cat b"], after.tokenizers[0])
    module, params = after.text_encoders[0]
    features = module.apply(params, jnp.asarray(ids))
    np.testing.assert_allclose(
        features.pooled[0], features.last_hidden_state[0, 5], rtol=1e-5
    )  # begin a cat cat_1 b end


@pytest.mark.parametrize(
    ("held", "word", "message"),
    [
        (
            {"<toy>": GRAND},
            "",
            "has vectors of shape .2, 12., but the text encoder reads 8 numbers each; it was made for",
        ),
        (
            {"clip_l": TWO, "clip_g": GRAND},
            "",
            "its vectors are named clip_g, clip_l, and Stable Diffusion 1 reads emb_params, clip_l, .* made for",
        ),
        (
            {"lora_unet_map.lora_down.weight": ONE},
            "",
            "a few vectors each, got lora_unet_map.lora_down.weight of shape",
        ),
        ({"<toy>": np.float16([[np.inf] * 8])}, "", "<toy> has 8 of 8 values that are NaN or infinite"),
        ({"emb_params": TWO, "clip_l": TWO}, "", "expected one name for each text encoder, got clip_l, emb_params"),
        ({"<toy>": ONE}, "BREAK", "BREAK means something else in prompts; call it by another name"),
        ({"<toy>": ONE}, "a AND b", "a AND b means something else in prompts"),
        ({"<lora:toy:1>": ONE}, "", "<lora:toy:1> means something else in prompts"),
        ({"<toy>": ONE}, "__toy__", "__toy__ means something else in prompts"),
        ({"<toy>": ONE}, "TH", "TH is a token of the model already"),
        ({"<toy>": np.zeros((2, 3, 8), np.float32)}, "", "a few vectors each, got <toy> of shape .2, 3, 8."),
        ({"<toy>": np.zeros((0, 8), np.float32)}, "", "has vectors of shape .0, 8."),
        ({"<|endoftext|>": ONE}, "", "is a token of the model already"),
        ({"<a>": ONE, "<b>": ONE}, "mine", "has the words <a>, <b>: only a single one can be called mine"),
        ({}, "", "got a file without tensors"),
    ],
)
def test_what_does_not_fit_is_one_line(held, word, message, pipeline, tmp_path):
    write_file(tmp_path / "x.safetensors", held)
    with pytest.raises(ValueError, match=message) as raised:
        add_embeddings(pipeline, tmp_path / "x.safetensors", word)
    assert "\n" not in str(raised.value)


def test_the_form_of_another_model_is_named(of_two, tmp_path):
    """The one name of Stable Diffusion 1, read by two encoders."""
    write_file(tmp_path / "toy.safetensors", {"emb_params": TWO})
    message = (
        "toy.safetensors: its vectors are named emb_params, and Stable Diffusion XL reads clip_l, .*clip_g, .* it was"
    )
    with pytest.raises(ValueError, match=message):
        add_embeddings(of_two, tmp_path / "toy.safetensors")


def test_words_for_one_encoder_of_two_and_words_twice_are_refused(of_two, pipeline, tmp_path):
    write_file(tmp_path / "toy.safetensors", {"<toy>": TWO})
    with pytest.raises(ValueError, match="<toy> has no vectors for text_encoder_2 of Stable Diffusion XL"):
        add_embeddings(of_two, tmp_path / "toy.safetensors")
    after = add_embeddings(pipeline, tmp_path / "toy.safetensors")
    with pytest.raises(ValueError, match="<toy> is a token of the model already"):
        add_embeddings(after, tmp_path / "toy.safetensors")
    add_embeddings(after, tmp_path / "toy.safetensors", "<other>")
    with pytest.raises(ValueError, match="learned words need the tokenizers"):
        add_embeddings(pipeline._replace(tokenizers=()), tmp_path / "toy.safetensors")


def test_a_saved_pipeline_has_its_words(pipeline, tmp_path):
    write_file(tmp_path / "cat.safetensors", {"emb_params": TWO})
    save_pipeline(add_embeddings(pipeline, tmp_path / "cat.safetensors"), tmp_path / "saved")
    after = load_pipeline(tmp_path / "saved")
    np.testing.assert_array_equal(rows(after, "a cat b"), in_prompt(pipeline, TWO, pipeline))


@pytest.mark.slow  # imports diffusers
def test_text_embeddings_are_those_of_the_peer(vocabulary, tmp_path):  # noqa: F811
    torch = pytest.importorskip("torch")
    whole = published("sd", vocabulary, tmp_path / "theirs")
    write_file(tmp_path / "toy.safetensors", {"<toy>": TWO})
    ours = add_embeddings(load_pipeline(tmp_path / "theirs"), tmp_path / "toy.safetensors")
    whole.load_textual_inversion(tmp_path / "toy.safetensors")
    save_pipeline(ours, tmp_path / "ours")
    back = type(whole).from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        again = back.encode_prompt("a <toy> b", "cpu", 1, do_classifier_free_guidance=False)[0].numpy()
        theirs = whole.encode_prompt("a <toy> b", "cpu", 1, do_classifier_free_guidance=False)[0].numpy()
    np.testing.assert_allclose(again, theirs, rtol=1e-4, atol=1e-5)
    conditioning = from_published(ours, (8, 8)).conditioning
    np.testing.assert_allclose(conditioning.of_prompts(["a <toy> b"])["text"], theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        conditioning.of_records({"caption": ["a <toy> b"]})["text"], theirs, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("words", "prompt", "vectors"),
    [
        ({"bad": TWO, "bad-artist": ONE}, "a bad-artist b", ONE),
        ({"<s1>": TWO, "<s0>": ONE}, "a <s1><s0> b", np.concatenate([TWO, ONE])),
        ({"<s1>": TWO, "<s0>": ONE}, "a<s0><s1>b", np.concatenate([ONE, TWO])),
        ({"bad": TWO, "bad2": ONE}, "a bad2 bad b", np.concatenate([ONE, TWO])),
    ],
)
def test_words_beside_one_another_are_the_peers(words, prompt, vectors, pipeline, tmp_path):
    """The longest word is found first, and one in angle brackets needs no space around it, as in diffusers."""
    after = pipeline
    for i, (word, rows_of_word) in enumerate(words.items()):
        write_file(tmp_path / f"{i}.safetensors", {word: rows_of_word})
        after = add_embeddings(after, tmp_path / f"{i}.safetensors")
    np.testing.assert_array_equal(rows(after, prompt), in_prompt(pipeline, vectors, pipeline))
    assert learned_words(after.tokenizers[0]) == {word: len(rows_of_word) for word, rows_of_word in words.items()}
    assert from_published(after).conditioning.words == learned_words(after.tokenizers[0])
