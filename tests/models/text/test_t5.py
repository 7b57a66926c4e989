"""T5's encoder ignores padding, depends only on the distance of positions, and equals that of transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_text_encoder, save_text_encoder
from diffusion_jax.models.text.t5 import T5Encoder, position_buckets

TINY = dict(vocab_size=50, d_model=24, d_kv=5, d_ff=40, num_layers=3, num_heads=3)
NEAR = TINY | dict(relative_attention_num_buckets=8, relative_attention_max_distance=12, layer_norm_epsilon=1e-5)
GATED, PLAIN = dict(feed_forward_proj="gated-gelu"), TINY | dict(feed_forward_proj="relu")  # v1.1, and before
IDS = jax.random.randint(jax.random.key(0), (3, 9), 2, 50)
MASK = jnp.arange(9) < jnp.array([[9], [5], [1]])


@functools.cache
def variables():
    encoder = T5Encoder(**TINY)
    return jax.jit(encoder.init)(jax.random.key(0), *encoder.example_inputs())


def run(ids, mask, **changes):
    return jax.jit(T5Encoder(**TINY, **changes).apply)(variables(), ids, mask)


def test_tokens_do_not_depend_on_padding():
    out, other = run(IDS, MASK), run(jnp.where(MASK, IDS, 7), MASK)
    np.testing.assert_array_equal(out[MASK], other[MASK])
    shorter = run(IDS[:, :5], MASK[:, :5])
    np.testing.assert_allclose(out[1, :5], shorter[1], atol=1e-5)


def test_order_matters():
    out, turned = (run(ids, jnp.ones((1, 9), bool)) for ids in (IDS[:1], IDS[:1, ::-1]))
    assert np.abs(out - turned[:, ::-1]).max() > 1e-3


def test_buckets():
    """With 8 buckets up to distance 16: 0 and 1 each have one, then [2, 6) and from 6 on, since 2·sqrt(8) is 5.7."""
    row = position_buckets(20, 8, 16)[0]
    np.testing.assert_array_equal(row, [0, 5] + [6] * 4 + [7] * 14)
    buckets = position_buckets(20, 8, 16)
    np.testing.assert_array_equal(buckets[1:, 1:], buckets[:-1, :-1])  # of the distance alone
    np.testing.assert_array_equal(buckets.T[1:, 0], buckets[1:, 0] + 4)  # keys after the query: the other half


def test_half_precision_keeps_parameters_and_results_in_float32():
    exact, out = (run(IDS, MASK, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert out.dtype == jnp.float32
    assert 0 < np.abs(out - exact).max() < 0.05 * np.abs(exact).max()


def test_other_feed_forwards_are_refused():
    encoder = T5Encoder(**TINY, feed_forward_proj="gated-silu")
    with pytest.raises(ValueError, match="feed_forward_proj: expected 'gated-gelu' or 'relu', got 'gated-silu'"):
        jax.eval_shape(encoder.init, jax.random.key(0), IDS, MASK)


@pytest.mark.parametrize("length", [9, 300])  # beyond the largest distance too
@pytest.mark.parametrize(("kind", "config"), [("T5", TINY), ("T5", NEAR), ("T5", PLAIN), ("UMT5", TINY)])
def test_agrees_with_the_peer_both_ways(kind, config, length, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = getattr(transformers, f"{kind}EncoderModel")
    theirs = peer(getattr(transformers, f"{kind}Config")(**GATED | config)).eval()
    for parameter in theirs.parameters():  # scales start as 1, which would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = np.random.default_rng(0).integers(2, 50, (2, length))
    mask = np.arange(length) < np.array([[length], [length // 2]])

    def run_peer(model):
        with torch.no_grad():
            return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()

    expected = run_peer(theirs)
    encoder, weights = load_text_encoder(tmp_path / "theirs")
    out = np.asarray(jax.jit(encoder.apply)(weights, jnp.asarray(ids), jnp.asarray(mask)))
    assert np.abs(out - expected)[mask].max() <= 2e-5 * np.abs(expected).max()

    save_text_encoder(encoder, weights, tmp_path / "ours")
    back, report = peer.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    np.testing.assert_array_equal(run_peer(back.eval()), expected)
