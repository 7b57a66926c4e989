"""Qwen3 is causal, ignores padding, reads only the layers it needs, and equals that of transformers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_text_encoder, save_text_encoder
from diffusion_jax.models.text.qwen3 import Qwen3Encoder

TINY = dict(
    vocab_size=50,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
)
IDS = jax.random.randint(jax.random.key(0), (3, 9), 2, 50)
MASK = jnp.arange(9) < jnp.array([[9], [5], [1]])


@functools.cache
def variables():
    encoder = Qwen3Encoder(**TINY)
    return jax.jit(encoder.init)(jax.random.key(0), *encoder.example_inputs())


def run(ids, mask, **changes):
    return jax.jit(Qwen3Encoder(**TINY, **changes).apply)(variables(), ids, mask)


def test_a_token_depends_on_those_before_it_alone():
    out, other = run(IDS, MASK), run(IDS.at[:, 6].set(3), MASK)
    np.testing.assert_array_equal(out[:, :6], other[:, :6])
    assert np.abs(out[0, 6:] - other[0, 6:]).max(axis=-1).min() > 1e-3


def test_padding_is_not_attended_to():
    out, other = run(IDS, MASK), run(IDS.at[1, 6].set(3), MASK)
    np.testing.assert_array_equal(out[1, [5, 7, 8]], other[1, [5, 7, 8]])


def test_states_are_joined_in_the_order_asked_for():
    states = [run(IDS, MASK, outputs=(i,)) for i in range(5)]
    np.testing.assert_array_equal(states[0], variables()["params"]["embed_tokens"]["embedding"][IDS])
    np.testing.assert_allclose(run(IDS, MASK, outputs=(3, 1)), jnp.concatenate([states[3], states[1]], -1), atol=1e-6)
    assert all(np.abs(a - b).max() > 1e-3 for a, b in itertools.pairwise(states))
    shapes = jax.eval_shape(Qwen3Encoder(**TINY, outputs=(3, 1)).init, jax.random.key(0), IDS, MASK)
    assert sorted(shapes["params"]) == ["embed_tokens", "layers_0", "layers_1", "layers_2"]


def test_half_precision_keeps_parameters_and_results_in_float32():
    exact, out = (run(IDS, MASK, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


def test_published_size():
    """Parameters of Qwen3-4B: all layers are alike, so two of them tell those of 36."""

    def count(layers):
        encoder = Qwen3Encoder(num_hidden_layers=layers)
        shapes = jax.eval_shape(encoder.init, jax.random.key(0), *encoder.example_inputs())
        return sum(leaf.size for leaf in jax.tree.leaves(shapes))

    assert count(1) + 35 * (count(2) - count(1)) == 4_022_468_096


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outputs": (5,)}, r"outputs: expected states from 0 to 4, got \(5,\)"),
        ({"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
    ],
)
def test_fields_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(Qwen3Encoder(**TINY, **changes).init, jax.random.key(0), IDS, MASK)


CONFIGS = {
    "plain": TINY,
    "one head for all": TINY | dict(num_key_value_heads=1, rms_norm_eps=1e-4),
    "biases": TINY | dict(num_key_value_heads=6, attention_bias=True, rope_parameters={"rope_theta": 1e6}),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_the_peer_both_ways(config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.Qwen3Model(transformers.Qwen3Config(**CONFIGS[config])).eval()
    for parameter in theirs.parameters():  # scales start as 1, which would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    length = 31
    ids = np.random.default_rng(0).integers(2, 50, (3, length))
    mask = np.arange(length) < np.array([[length], [17], [1]])

    def run_peer(model):
        with torch.no_grad():
            out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), output_hidden_states=True)
        return [state.numpy() for state in out.hidden_states]

    expected = run_peer(theirs)
    encoder, weights = load_text_encoder(tmp_path / "theirs")
    for outputs, states in ((None, expected[-1:]), ((1, 3), [expected[1], expected[3]])):
        out = np.asarray(jax.jit(encoder.clone(outputs=outputs).apply)(weights, jnp.asarray(ids), jnp.asarray(mask)))
        joined = np.concatenate(states, axis=-1)
        assert np.abs(out - joined).max() <= 2e-6 * np.abs(joined).max(), "padding too"

    save_text_encoder(encoder, weights, tmp_path / "ours")
    back, report = transformers.Qwen3Model.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for ours, state in zip(run_peer(back.eval()), expected, strict=True):
        np.testing.assert_array_equal(ours, state)
