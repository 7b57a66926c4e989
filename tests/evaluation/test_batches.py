"""Functions of batches over any number of items."""

import numpy as np
import pytest

from diffusion_jax.evaluation import batches


@pytest.mark.parametrize("count", [1, 5, 8, 17])
def test_every_item_is_used_once(count, monkeypatch):
    monkeypatch.setattr(batches, "BATCH", 8)
    x, y = np.arange(3 * count).reshape(count, 3), np.arange(count)
    sizes = []
    outputs = batches.mapped(lambda a, b: sizes.append(len(a)) or {"sum": a.sum(axis=1) + b}, x, y)
    np.testing.assert_array_equal(outputs["sum"], x.sum(axis=1) + y)
    assert len(set(sizes)) == 1
