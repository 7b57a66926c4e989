"""CLIP's text encoder is causal, pools at the end of a text, and equals that of transformers on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_text_encoder, save_text_encoder
from diffusion_jax.models.text.clip import ClipTextEncoder

BOS, EOS, LENGTH = 48, 49, 9
TINY = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=LENGTH,
    eos_token_id=EOS,
)
FAMILIES = {  # which of the published encoders has these traits
    "Stable Diffusion 1, first encoder of XL": TINY | dict(eos_token_id=2),
    "Stable Diffusion 2": TINY | dict(hidden_act="gelu", layer_norm_eps=1e-6),
    "second encoder of XL": TINY | dict(hidden_act="gelu", projection_dim=20, eos_token_id=2),
    "projection, later configs": TINY | dict(projection_dim=20),
    "one layer": TINY | dict(num_hidden_layers=1),
}


def texts(pad):
    """Token ids of three texts of 7, 3 and 0 words."""
    words = np.random.default_rng(0).integers(3, BOS, 7)
    rows = [[BOS, *words[:n], EOS] for n in (7, 3, 0)]
    return jnp.array([row + [pad] * (LENGTH - len(row)) for row in rows])


@functools.cache
def variables():
    """Of the tiny encoder with a projection, all of them random: biases and scales start as 0 and 1."""
    encoder = ClipTextEncoder(**TINY, projection_dim=20)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example_inputs())
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * draw.normal(size=leaf.shape), jnp.float32), shapes)


def run(ids, weights=None, **changes):
    encoder = ClipTextEncoder(**TINY | dict(projection_dim=20) | changes)
    return jax.jit(encoder.apply)(weights or variables(), ids)


def test_no_token_sees_a_later_one():
    ids = texts(EOS)
    out, other = (run(x) for x in (ids, ids.at[:, 5:].set(7)))
    for name in ("last_hidden_state", "penultimate"):
        a, b = getattr(out, name), getattr(other, name)
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert (np.abs(a[0, 5:-1] - b[0, 5:-1]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize("pad", [EOS, 0])
def test_pools_at_the_first_end(eos, pad):
    out = run(texts(pad), eos_token_id=eos)
    np.testing.assert_allclose(out.pooled, pooled_at(out, [8, 4, 1]), atol=1e-5)


def test_an_end_that_is_not_the_largest_id():
    out = run(jnp.array([[BOS, 7, EOS, 5, 5]]), eos_token_id=5)
    np.testing.assert_allclose(out.pooled, pooled_at(out, [3]), atol=1e-5)


def pooled_at(out, places):
    ends = out.last_hidden_state[jnp.arange(len(places)), jnp.array(places)]
    return ends @ variables()["params"]["text_projection"]["kernel"]


def test_the_last_layer_is_given_the_penultimate():
    """The encoder without its last layer ends, before its norm, where the whole one was before that layer."""
    weights = variables()["params"]["text_model"]
    norm = {"scale": jnp.ones(24), "bias": jnp.zeros(24)}
    layers = {name: layer for name, layer in weights["encoder"].items() if name != "layers_2"}
    cut = {"params": {"text_model": weights | {"encoder": layers, "final_layer_norm": norm}}}
    shorter = run(texts(EOS), cut, num_hidden_layers=2, projection_dim=None)
    x = run(texts(EOS)).penultimate
    normed = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(shorter.last_hidden_state, normed, atol=1e-4)


def test_half_precision_keeps_parameters_and_results_in_float32():
    half, full = (jax.tree.leaves(run(texts(EOS), dtype=dtype)) for dtype in (jnp.bfloat16, jnp.float32))
    for a, b in list(zip(half, full, strict=True))[:2]:  # and not the embeddings, which nothing multiplies
        assert a.dtype == jnp.float32
        assert 0 < np.abs(a - b).max() < 0.05 * np.abs(b).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "swish"}, "hidden_act: expected one of gelu, quick_gelu, got 'swish'"),
        ({"num_attention_heads": 5}, "hidden_size 24 cannot be split into 5 heads"),
        ({"max_position_embeddings": 8}, "reads at most 8 tokens, got 9"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message):
    encoder = ClipTextEncoder(**TINY | changes)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(encoder.init, jax.random.key(0), texts(EOS))


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_peer_both_ways(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, ids = FAMILIES[family], jnp.concatenate([texts(EOS), texts(0)])
    kind = transformers.CLIPTextModelWithProjection if "projection_dim" in config else transformers.CLIPTextModel
    torch.manual_seed(0)
    theirs = kind(transformers.CLIPTextConfig(**config, bos_token_id=BOS)).eval()
    for parameter in theirs.parameters():  # biases and scales start as 0 and 1, which would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")

    def run_peer(model):
        with torch.no_grad():
            out = model(torch.tensor(np.array(ids)), output_hidden_states=True)
        pooled = out.text_embeds if "projection_dim" in config else out.pooler_output
        return [x.numpy() for x in (out.last_hidden_state, pooled, *out.hidden_states)]

    expected = run_peer(theirs)
    encoder, weights = load_text_encoder(tmp_path / "theirs")
    for ours, other in zip(jax.tree.leaves(jax.jit(encoder.apply)(weights, ids)), expected, strict=True):
        assert np.abs(ours - other).max() <= 2e-5 * np.abs(other).max()

    save_text_encoder(encoder, weights, tmp_path / "ours")
    back, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for again, other in zip(run_peer(back.eval()), expected, strict=True):
        np.testing.assert_array_equal(again, other)
