"""Functions of batches over any number of items."""

import numpy as np
import pytest

from diffusion_jax.data.order import Part
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord
from diffusion_jax.evaluation import batches, records


@pytest.mark.parametrize("count", [1, 5, 8, 17])
def test_every_item_is_used_once(count, monkeypatch):
    monkeypatch.setattr(batches, "BATCH", 8)
    x, y = np.arange(3 * count).reshape(count, 3), np.arange(count)
    sizes = []
    outputs = batches.mapped(lambda a, b: sizes.append(len(a)) or {"sum": a.sum(axis=1) + b}, x, y)
    np.testing.assert_array_equal(outputs["sum"], x.sum(axis=1) + y)
    assert len(set(sizes)) == 1


def test_some_records_of_many_shards_are_from_few_of_them():
    def read(index):
        if index == 7:
            raise BadRecord("broken")
        return {"label": index}

    source = Source("shards", 1000, read, parts=(Part(1000, blocks=[10] * 100),))
    found = list(records.good_records(source, lambda record, rng: record, seed=1))
    assert sorted(index for index, _ in found) == sorted({*range(1000)} - {7})
    assert all(record["label"] == index for index, record in found)
    first = [index for index, _ in found[:30]]
    assert len({index // 10 for index in first}) <= 4 and first != sorted(first)
