"""The BERT encoder ignores padding, and equals that of transformers on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop.names import from_torch
from diffusion_jax.models.text.bert import BertEncoder

TINY = dict(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=16,
)
IDS = jax.random.randint(jax.random.key(0), (3, 9), 0, 50)
MASK = jnp.arange(9) < jnp.array([[9], [5], [2]])


def test_tokens_do_not_depend_on_padding():
    bert = BertEncoder(**TINY)
    params = bert.init(jax.random.key(0), IDS, MASK)
    out = bert.apply(params, IDS, MASK)
    assert out.dtype == jnp.float32
    other = bert.apply(params, jnp.where(MASK, IDS, 7), MASK)
    np.testing.assert_allclose(out[MASK], other[MASK], atol=1e-6)
    shorter = bert.apply(params, IDS[:, :5], MASK[:, :5])
    np.testing.assert_allclose(out[1, :5], shorter[1], atol=1e-5)


def test_equals_the_peer():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    peer = transformers.BertModel(transformers.BertConfig(**TINY), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in peer.parameters():  # biases and scales too, which start at 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = peer(
            torch.tensor(np.array(IDS)), attention_mask=torch.tensor(np.array(MASK))
        ).last_hidden_state.numpy()
    bert = BertEncoder(**TINY)
    like = jax.eval_shape(bert.init, jax.random.key(0), IDS, MASK)
    tensors = {name: parameter.detach().numpy() for name, parameter in peer.named_parameters()}
    out = bert.apply(from_torch(tensors, "the peer", like), IDS, MASK)
    np.testing.assert_allclose(out[MASK], expected[MASK], atol=2e-5)
