"""Attention in one kernel, which keeps the scores in the processor: cuDNN's on GPU, JAX's Pallas kernel on TPU.

The arguments are those of `attention.attention`. The kernels have a gradient, and no forward derivative.
"""

import math

import jax
import jax.numpy as jnp

LANES = 128  # numbers in a row of a TPU's registers
TILES = (512, 384, 256, 128)  # tokens at a time in the Pallas kernel, whose own choice is 128: 16 times as many steps


def cudnn(q, k, v, mask):
    """cuDNN's kernel. It wants a mask whole, and then sequences of even length."""
    queries = q.shape[1]
    if mask is not None:
        q, k, v, mask = (_padded(x, (1,), 2) for x in (q, k, v, mask))
        mask = jnp.broadcast_to(mask[:, None, None, :], (len(q), 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")[:, :queries]


def flash(q, k, v, mask):
    """The Pallas kernel (Dao et al. 2022). Sequences, and heads wider than 128, are padded to multiples of 128."""
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas  # imported late: only TPUs need it

    queries, width = q.shape[1], q.shape[-1]
    if mask is None and k.shape[1] % LANES:
        mask = jnp.ones(k.shape[:2], bool)
    q, k, v = (_padded(h, (1, 3) if width > LANES else (1,)).swapaxes(1, 2) for h in (q, k, v))
    segments = None
    if mask is not None:  # queries attend to the keys of their own segment
        segments = pallas.SegmentIds(jnp.ones((len(q), q.shape[2]), jnp.int32), _padded(mask.astype(jnp.int32), (1,)))
    sizes = pallas.BlockSizes(*_tiles(q.shape[2], k.shape[2]))
    out = pallas.flash_attention(q, k, v, segment_ids=segments, sm_scale=1 / math.sqrt(width), block_sizes=sizes)
    return out.swapaxes(1, 2)[:, :queries, :, :width]


def _padded(x, axes, multiple=LANES):
    """x with zeros at the end of these axes, up to multiples of a number."""
    return jnp.pad(x, [(0, -size % multiple if axis in axes else 0) for axis, size in enumerate(x.shape)])


def _tiles(queries, keys):
    """Tiles of queries and of keys: of the forward pass, of the gradient of keys and values, of that of queries."""
    q, k = (next(tile for tile in TILES if count % tile == 0) for count in (queries, keys))
    return q, k, k, 1, *(q, k, k, q), *(k, k, q)
