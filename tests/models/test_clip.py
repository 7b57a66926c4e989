"""CLIP's text encoder sees no later token, pools at the end of a text, and equals the peer's on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_text_encoder, save_text_encoder
from diffusion_jax.models.clip import ClipTextEncoder

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


def initialised(**changes):
    encoder = ClipTextEncoder(**TINY | changes)
    params = encoder.init(jax.random.key(0), *encoder.example_inputs())
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.1 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return encoder, jax.tree.map(jnp.add, params, jax.tree.unflatten(tree, noise))


def test_no_token_sees_a_later_one():
    encoder, params = initialised()
    ids = texts(EOS)
    out, other = (encoder.apply(params, x) for x in (ids, ids.at[:, 5:].set(7)))
    for name in ("last_hidden_state", "penultimate"):
        a, b = getattr(out, name), getattr(other, name)
        np.testing.assert_array_equal(a[:, :5], b[:, :5])
        assert (np.abs(a[0, 5:] - b[0, 5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("eos", [EOS, 2])
@pytest.mark.parametrize("pad", [EOS, 0])
def test_pools_at_the_first_end(eos, pad):
    encoder, params = initialised(eos_token_id=eos)
    out = encoder.apply(params, texts(pad))
    np.testing.assert_array_equal(out.pooled, out.last_hidden_state[jnp.arange(3), jnp.array([8, 4, 1])])


def test_an_end_that_is_not_the_largest_id():
    encoder, params = initialised(eos_token_id=5)
    out = encoder.apply(params, jnp.array([[BOS, 7, EOS, 5, 5]]))
    np.testing.assert_array_equal(out.pooled, out.last_hidden_state[:, 3])


def test_the_last_layer_is_given_the_penultimate():
    """The encoder without its last layer ends, before its norm, where the whole one was before that layer."""
    encoder, params = initialised()
    shorter = encoder.clone(num_hidden_layers=TINY["num_hidden_layers"] - 1)
    weights = params["params"]["text_model"]
    norm = {"scale": weights["final_layer_norm"]["scale"] * 0 + 1, "bias": weights["final_layer_norm"]["bias"] * 0}
    layers = {name: layer for name, layer in weights["encoder"].items() if name != "layers_2"}
    cut = {"params": {"text_model": weights | {"encoder": layers, "final_layer_norm": norm}}}
    x = encoder.apply(params, texts(EOS)).penultimate
    mean, std = x.mean(-1, keepdims=True), x.std(-1, keepdims=True)
    out = shorter.apply(cut, texts(EOS)).last_hidden_state
    np.testing.assert_allclose(out, (x - mean) / std, atol=1e-4)


def test_half_precision_keeps_parameters_and_results_in_float32():
    encoder, params = initialised(projection_dim=20)
    exact = encoder.apply(params, texts(EOS))
    out = encoder.clone(dtype=jnp.bfloat16).apply(params, texts(EOS))
    for a, b in zip(out, exact, strict=True):
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


@pytest.mark.parametrize("pad", [EOS, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_peer_both_ways(family, pad, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, ids = FAMILIES[family], texts(pad)
    kind = transformers.CLIPTextModelWithProjection if "projection_dim" in config else transformers.CLIPTextModel
    torch.manual_seed(0)
    theirs = kind(transformers.CLIPTextConfig(**config, bos_token_id=BOS)).eval()
    for parameter in theirs.parameters():  # biases and scales start as 0 and 1, which would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")

    def run(model):
        with torch.no_grad():
            out = model(torch.tensor(np.array(ids)), output_hidden_states=True)
        pooled = out.text_embeds if "projection_dim" in config else out.pooler_output
        return [x.numpy() for x in (out.last_hidden_state, out.hidden_states[-2], pooled)]

    expected = run(theirs)
    encoder, variables = load_text_encoder(tmp_path / "theirs")
    for ours, other in zip(jax.jit(encoder.apply)(variables, ids), expected, strict=True):
        assert np.abs(ours - other).max() <= 2e-5 * np.abs(other).max()

    save_text_encoder(encoder, variables, tmp_path / "ours")
    back, report = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for again, other in zip(run(back.eval()), expected, strict=True):
        np.testing.assert_array_equal(again, other)
