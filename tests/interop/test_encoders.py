"""Folders of text encoders: all names that transformers used, one-line errors, and the common interface."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diffusion_jax.interop import load_text_encoder, save_text_encoder
from diffusion_jax.interop.encoders import files_of, text_encoder, without_last_layers
from diffusion_jax.interop.names import to_torch
from diffusion_jax.interop.tensors import read_tensors, write_file
from diffusion_jax.models.text.bert import BertEncoder
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.text.embedding import mean_of_tokens
from diffusion_jax.models.text.qwen3 import Qwen3Encoder
from diffusion_jax.models.text.t5 import T5Encoder

CLIP = ClipTextEncoder(9, 8, 12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=6, eos_token_id=1)
ENCODERS = {
    "CLIPTextModel": CLIP,
    "CLIPTextModelWithProjection": CLIP.clone(projection_dim=4),
    "T5EncoderModel": T5Encoder(9, 8, 4, 12, 2, 2),
    "UMT5EncoderModel": T5Encoder(9, 8, 4, 12, 2, 2, own_biases=True),
    "BertModel": BertEncoder(9, 8, 2, 2, 12, 6),
    "Qwen3Model": Qwen3Encoder(9, 8, 12, 3, 4, 2, 6),
}


@functools.cache
def variables(name):
    """Different numbers everywhere."""
    encoder = ENCODERS[name]
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example_inputs())
    return jax.tree.map(lambda s: jnp.cos(jnp.arange(s.size, dtype=jnp.float32)).reshape(s.shape), shapes)


def saved(name, folder, **changes):
    """A folder with a changed config.json; None removes a field."""
    save_text_encoder(ENCODERS[name], variables(name), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({field: value for field, value in config.items() if value is not None}))
    return folder


def assert_same(loaded, name):
    encoder, weights = loaded
    assert encoder == ENCODERS[name]
    jax.tree.map(np.testing.assert_array_equal, weights, variables(name))


@pytest.mark.parametrize("name", ENCODERS)
def test_round_trip(name, tmp_path):
    assert_same(load_text_encoder(saved(name, tmp_path)), name)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize(
    ("name", "rename", "extra"),
    [
        ("CLIPTextModel", lambda n: n.removeprefix("text_model."), "embeddings.position_ids"),
        ("CLIPTextModelWithProjection", lambda n: n, "text_model.embeddings.position_ids"),
        ("T5EncoderModel", lambda n: n.replace("shared.", "encoder.embed_tokens."), None),
        ("T5EncoderModel", lambda n: n, "encoder.embed_tokens.weight"),
    ],
)
def test_all_namings_are_one(name, rename, extra, tmp_path):
    saved(name, tmp_path)
    tensors = {rename(key): tensor for key, tensor in to_torch(variables(name)).items()}
    if extra:
        tensors[extra] = tensors.get("shared.weight", np.arange(6)[None])
    write_file(tmp_path / "model.safetensors", tensors)
    assert_same(load_text_encoder(tmp_path), name)


T5_CONFIG = dict(vocab_size=50, d_model=24, d_kv=5, d_ff=40, num_layers=2, num_heads=3)
BERT_CONFIG = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40)
CLIP_CONFIG = BERT_CONFIG | dict(max_position_embeddings=9, eos_token_id=49, bos_token_id=48, projection_dim=10)
QWEN3_CONFIG = BERT_CONFIG | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=10)
PICTURES = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, image_size=8)


@pytest.mark.parametrize(
    ("name", "config", "part"),
    [
        ("T5ForConditionalGeneration", T5_CONFIG, "encoder"),
        ("T5ForConditionalGeneration", T5_CONFIG | dict(feed_forward_proj="gated-gelu"), "encoder"),
        ("T5Model", T5_CONFIG, "encoder"),
        ("MT5ForConditionalGeneration", T5_CONFIG, "encoder"),
        ("MT5EncoderModel", T5_CONFIG, "encoder"),
        ("UMT5ForConditionalGeneration", T5_CONFIG, "encoder"),
        ("BertForMaskedLM", BERT_CONFIG, "bert"),
        ("BertForPreTraining", BERT_CONFIG, "bert"),
        ("Qwen3ForCausalLM", QWEN3_CONFIG, "model"),
        ("CLIPModel", {"text_config": CLIP_CONFIG, "vision_config": PICTURES | {"patch_size": 4}}, "text_model"),
    ],
)
def test_a_whole_model_is_read_for_its_text_encoder(name, config, part, tmp_path, caplog):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    theirs = kind(kind.config_class(**config)).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(2, 48, (2, 9))
    ids[:, -1] = 49
    mask = np.arange(9) < np.array([[9], [9 if name == "CLIPModel" else 5]])
    peer = getattr(theirs, part, None) or theirs.get_submodule(f"base_model.{part}")
    with torch.no_grad():
        expected = peer(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    encoder, weights = load_text_encoder(tmp_path)
    inputs = [jnp.asarray(ids), jnp.asarray(mask)][: len(encoder.example_inputs())]
    out = jax.jit(encoder.apply)(weights, *inputs)
    out = getattr(out, "last_hidden_state", out)
    assert np.abs(out - expected)[mask].max() <= 2e-5 * np.abs(expected).max()
    assert not caplog.records


def test_the_first_names_of_bert_are_read(tmp_path):
    """As google-bert/bert-base-uncased has them."""
    saved("BertModel", tmp_path, architectures=["BertForMaskedLM"])
    tensors, _ = read_tensors(tmp_path, "model")
    first = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(name):
        return "bert." + next((name.replace(*pair) for pair in first.items() if name.endswith(pair[0])), name)

    write_file(tmp_path / "model.safetensors", {renamed(name): tensor for name, tensor in tensors.items()})
    assert_same(load_text_encoder(tmp_path), "BertModel")


def test_layers_beyond_the_config_are_left_out_with_a_warning(tmp_path, caplog):
    """As of folders that leave out the last layer by their config alone."""
    encoder, weights = load_text_encoder(saved("CLIPTextModel", tmp_path, num_hidden_layers=1))
    expected, kept = without_last_layers(CLIP, variables("CLIPTextModel"), 1)
    assert encoder == expected
    jax.tree.map(np.testing.assert_array_equal, weights, kept)
    assert "more layers than the 1 of its config.json" in caplog.text


def test_a_projection_that_the_weights_lack_is_ignored(tmp_path):
    assert_same(load_text_encoder(saved("CLIPTextModel", tmp_path, projection_dim=768)), "CLIPTextModel")


def test_half_precision(tmp_path):
    name = "CLIPTextModel"
    save_text_encoder(CLIP, variables(name), tmp_path, jnp.float16)
    assert {tensor.dtype for tensor in read_tensors(tmp_path, "model")[0].values()} == {np.dtype(np.float16)}
    for dtype in (jnp.float32, jnp.bfloat16):
        _, weights = load_text_encoder(tmp_path, dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "CLIPTextModel",
            {"architectures": ["GPT2Model"]},
            "CLIPTextModelWithProjection, CLIPModel, T5EncoderModel, .*, Qwen3ForCausalLM; got GPT2Model",
        ),
        ("CLIPTextModel", {"architectures": None}, "expected the architecture of a text encoder, .*; got None"),
        ("CLIPTextModel", {"architectures": 5}, "expected the architecture of a text encoder, .*; got 5"),
        ("CLIPTextModel", {"hidden_act": "relu"}, "hidden_act: expected one of gelu, quick_gelu, got 'relu'"),
        ("CLIPTextModel", {"num_hidden_layers": 3}, "lacks 16 tensors: text_model.encoder.layers.2"),
        ("CLIPTextModel", {"num_hidden_layers": 0}, "has unknown 32 tensors: text_model.encoder.layers.0"),
        ("CLIPTextModel", {"hidden_size": "wide"}, "no network can be built from it"),
        (
            "T5EncoderModel",
            {"feed_forward_proj": "gelu"},
            "feed_forward_proj: expected 'gated-gelu' or 'relu', got 'gelu'",
        ),
        ("T5EncoderModel", {"d_kv": 8}, "misshapen"),
        ("Qwen3Model", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("Qwen3Model", {"num_key_value_heads": 3}, "expected a multiple of num_key_value_heads = 3, got 4"),
        ("Qwen3Model", {"rope_scaling": {"type": "yarn"}}, "rope_type: expected 'default', got 'yarn'"),
        ("Qwen3Model", {"rope_parameters": "yarn"}, "rope_parameters: expected an object, got 'yarn'"),
        ("Qwen3Model", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ("Qwen3Model", {"head_dim": 4}, "misshapen"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(name, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        load_text_encoder(saved(name, tmp_path, **changes))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        load_text_encoder(tmp_path)
    (saved("CLIPTextModel", tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        load_text_encoder(tmp_path)


def write_tokenizer(folder, model, template, letters="abcdef"):
    words = ["<pad>", "</s>", "<s>", *letters]
    tokenizer = Tokenizer(
        models.Unigram([(word, -1.0) for word in words], 0)
        if model == "unigram"
        else models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="</s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [(word, words.index(word)) for word in template if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles | {"model_max_length": 6}))
    return folder


def test_clip_behind_the_seam(tmp_path):
    """The mask is True on padding too, since denoisers attend to it."""
    words = write_tokenizer(tmp_path / "tokenizer", "bpe", ["<s>", "$A", "</s>"])
    folder = saved("CLIPTextModel", tmp_path / "encoder")
    last, early, normed, raw = (
        text_encoder(folder, words, **settings)
        for settings in ({}, {"layer": "penultimate"}, {"layer": 1, "norm": True}, {"layer": "last", "norm": False})
    )
    ids, mask = last.tokenize(["a b", "c"])
    np.testing.assert_array_equal(ids, [[2, 3, 4, 1, 0, 0], [2, 5, 1, 0, 0, 0]])
    assert mask.all()
    out = jax.jit(CLIP.apply)(variables("CLIPTextModel"), ids)
    shorter_clip, shorter_params = without_last_layers(CLIP, variables("CLIPTextModel"), 1)
    cut = jax.jit(shorter_clip.apply)(shorter_params, ids)
    for encoder, tokens in (
        (last, out.last_hidden_state),
        (early, out.penultimate),
        (normed, cut.last_hidden_state),
        (raw, out.states[-1]),
    ):
        given = jax.jit(encoder.apply)(encoder.params, ids, mask)
        np.testing.assert_allclose(given.tokens, tokens, atol=1e-5)
        np.testing.assert_allclose(given.vector, out.pooled, atol=1e-5)
    assert (last.length, last.width) == (6, 8)

    shorter = text_encoder(folder, words, length=4)
    half = text_encoder(folder, words, dtype=jnp.bfloat16)
    assert shorter.length == 4
    np.testing.assert_allclose(
        jax.jit(half.apply)(half.params, ids, mask).tokens, out.last_hidden_state, atol=0.1, err_msg="in bfloat16"
    )
    with pytest.raises(ValueError, match="reads at most 6 tokens, got 7"):
        text_encoder(folder, words, length=7)
    for layer in ("first", 2, -1):
        with pytest.raises(ValueError, match="layer: expected last, penultimate or a number from 0 to 1, got "):
            text_encoder(folder, words, layer=layer)


def test_t5_behind_the_seam(tmp_path):
    words = write_tokenizer(tmp_path / "tokenizer", "unigram", ["$A", "</s>"])
    folder = saved("T5EncoderModel", tmp_path / "encoder")
    encoder = text_encoder(folder, words)
    ids, mask = encoder.tokenize(["a b", "c"])
    np.testing.assert_array_equal(ids, [[3, 4, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids > 0)
    tokens, vector = jax.jit(encoder.apply)(encoder.params, ids, mask)
    assert (tokens.shape, tokens.dtype) == ((2, encoder.length, encoder.width), jnp.float32)
    np.testing.assert_allclose(vector, mean_of_tokens(tokens, jnp.asarray(mask)), atol=1e-6)

    def rms(x):
        return np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))

    scale = variables("T5EncoderModel")["params"]["encoder"]["final_layer_norm"]["scale"]
    for layer in (0, 1):
        raw, normed = (text_encoder(folder, words, layer=layer, norm=norm) for norm in (False, True))
        plain, expected = (jax.jit(each.apply)(each.params, ids, mask).tokens for each in (raw, normed))
        np.testing.assert_allclose(plain / rms(plain) * scale, expected, atol=1e-4)
    assert np.abs(tokens - expected).max() > 1e-3, "the last layer but one is another"


def test_qwen3_behind_the_seam(tmp_path):
    """Only the layers that are used are read: the others may be missing."""
    words = write_tokenizer(tmp_path / "tokenizer", "bpe", ["$A"])
    folder = saved("Qwen3Model", tmp_path / "encoder")
    whole, params = ENCODERS["Qwen3Model"], variables("Qwen3Model")
    last = text_encoder(folder, words)
    ids, mask = last.tokenize(["a b", "c"])
    np.testing.assert_array_equal(ids, [[3, 4, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids > 0)
    out = jax.jit(whole.apply)(params, ids, mask)
    np.testing.assert_allclose(jax.jit(last.apply)(last.params, ids, mask).tokens, out, atol=1e-5)

    tensors, _ = read_tensors(folder, "model")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("layers.2.", "norm."))}
    write_file(folder / "model.safetensors", kept)
    early = text_encoder(folder, words, layer="penultimate")
    assert sorted(early.params["params"]) == ["embed_tokens", "layers_0", "layers_1"]
    states = jax.jit(whole.clone(outputs=(0, 2)).apply)(params, ids, mask)
    tokens, vector = jax.jit(early.apply)(early.params, ids, mask)
    np.testing.assert_allclose(tokens, states[..., 8:], atol=1e-5)
    np.testing.assert_allclose(vector, mean_of_tokens(tokens, jnp.asarray(mask)), atol=1e-6)
    assert (early.length, early.width) == (6, 8)
    with pytest.raises(ValueError, match=r"lacks 12 tensors: layers.2.input_layernorm.weight, "):
        text_encoder(folder, words)


def test_bert_behind_the_seam(tmp_path):
    """With the pooler and the names of a model for another task, and with its tokenizer in the same folder."""
    folder = saved("BertModel", tmp_path)
    tensors, _ = read_tensors(folder, "model")
    extra = {
        "pooler.dense.bias": np.zeros(8),
        "cls.predictions.bias": np.zeros(9),
        "embeddings.position_ids": np.arange(6),
    }
    write_file(folder / "model.safetensors", {f"bert.{name}": tensor for name, tensor in (tensors | extra).items()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##b", "c", "d"]))
    encoder = text_encoder(folder, length=6)
    ids, mask = encoder.tokenize(["A abb", "z"])
    np.testing.assert_array_equal(ids, [[2, 4, 4, 6, 6, 3], [2, 1, 3, 0, 0, 0]])
    np.testing.assert_array_equal(mask, ids > 0)
    expected = jax.jit(ENCODERS["BertModel"].apply)(variables("BertModel"), ids, mask)
    np.testing.assert_allclose(jax.jit(encoder.apply)(encoder.params, ids, mask).tokens, expected, atol=1e-5)
    with pytest.raises(ValueError, match="norm is for encoders with a final norm, and BERT has none"):
        text_encoder(folder, norm=True)


BPE = "bpe", ["<s>", "$A", "</s>"]
UNIGRAM = "unigram", ["$A", "</s>"]


@pytest.mark.parametrize(
    ("name", "words", "letters", "message"),
    [
        ("CLIPTextModel", UNIGRAM, "abcdef", "expected one of BPE, got Unigram"),
        ("T5EncoderModel", BPE, "abcdef", "expected one of Unigram, got BPE"),
        ("Qwen3Model", UNIGRAM, "abcdef", "expected one of BPE, got Unigram"),
        ("UMT5EncoderModel", UNIGRAM, "a", "it has 4 tokens, and the encoder has embeddings of 9"),
        ("BertModel", UNIGRAM, "abcdefg", "it has 10 tokens, and the encoder has embeddings of 9"),
        (
            "CLIPTextModel",
            ("bpe", ["</s>", "$A", "<s>"]),
            "abcdef",
            "with token 2, expected eos_token_id, 1",
        ),
    ],
)
def test_the_tokenizer_of_another_encoder_is_refused(name, words, letters, message, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer", *words, letters)
    with pytest.raises(ValueError, match=message) as error:
        text_encoder(saved(name, tmp_path / "text_encoder"))
    assert str(error.value).startswith(f"{tokenizer}: not the tokenizer of ") and "\n" not in str(error.value)


@pytest.mark.parametrize("eos", [1, 2])
def test_old_configs_of_clip_name_another_end_token(eos, tmp_path):
    write_tokenizer(tmp_path / "tokenizer", *BPE)
    folder = saved("CLIPTextModel", tmp_path / "text_encoder", eos_token_id=eos)
    assert text_encoder(folder).length == 6


def test_an_encoder_in_pickles_needs_leave(tmp_path):
    """As T5 v1.1 is published: pytorch_model.bin alone, or in shards."""
    torch = pytest.importorskip("torch")
    write_tokenizer(tmp_path / "tokenizer", *UNIGRAM)
    folder = saved("T5EncoderModel", tmp_path / "text_encoder")
    expected = text_encoder(folder).params
    tensors = {name: torch.from_numpy(np.array(tensor)) for name, tensor in read_tensors(folder, "model")[0].items()}
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, .* or set allow_pickle"):
        text_encoder(folder)
    jax.tree.map(np.testing.assert_array_equal, text_encoder(folder, allow_pickle=True).params, expected)
    assert [file.name for file in files_of(folder)[0]] == ["config.json", "pytorch_model.bin"]


def test_shards_of_an_encoder_are_read_and_hashed_together(tmp_path):
    write_tokenizer(tmp_path / "tokenizer", *UNIGRAM)
    folder = saved("T5EncoderModel", tmp_path / "text_encoder")
    expected, (tensors, _) = text_encoder(folder).params, read_tensors(folder, "model")
    (folder / "model.safetensors").unlink()
    places = {name: f"{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in {*places.values()}:
        write_file(folder / shard, {name: tensors[name] for name in tensors if places[name] == shard}, jnp.bfloat16)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    half = jax.tree.map(lambda leaf: np.float32(jnp.bfloat16(leaf)), expected)
    jax.tree.map(np.testing.assert_array_equal, text_encoder(folder).params, half)
    encoder, tokenizer = files_of(folder)
    assert [file.name for file in encoder] == [
        *("config.json", "model.safetensors.index.json", "0.safetensors", "1.safetensors")
    ]
    assert [file.name for file in tokenizer] == ["tokenizer.json", "tokenizer_config.json"]
    (folder / "1.safetensors").unlink()
    for read in (text_encoder, files_of):
        with pytest.raises(FileNotFoundError, match=r"1.safetensors: no such file, but model.safetensors.index.json"):
            read(folder)


def test_a_tokenizer_is_found_in_the_folder_or_beside_it(tmp_path):
    folder = saved("CLIPTextModel", tmp_path / "text_encoder_2")
    with pytest.raises(FileNotFoundError, match=r"text_encoder_2: expected its tokenizer there or in .*tokenizer_2"):
        text_encoder(folder)
    write_tokenizer(tmp_path / "tokenizer_2", "bpe", ["<s>", "$A", "</s>"])
    assert text_encoder(folder).length == 6
