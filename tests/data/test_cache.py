"""A cache has the outputs of its functions, and is never half written."""

import logging

import numpy as np
import pytest

from diffusion_jax.data.cache import cached
from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord


def numbers(size: int, bad: tuple[int, ...] = ()) -> Source:
    """Records that hold their own index."""

    def read(index):
        if index in bad:
            raise BadRecord("broken")
        return {"image": np.full((2, 2, 3), index, np.uint8), "label": index}

    return Source(f"{size} numbers", size, read, num_classes=3, captions=[f"number {i}" for i in range(size)])


class Fields:
    """Functions of a batch that remember the sizes of the batches they saw."""

    def __init__(self):
        self.sizes = []

    def latent(self, batch):
        self.sizes.append(len(batch["label"]))
        return batch["image"].astype(np.float32) / 2

    def cond(self, batch):
        return {"text": np.ones((3, 1)) * batch["label"][:, None, None], "label": batch["label"]}

    def all(self):
        return {"latent": self.latent, "cond": self.cond}


def test_it_holds_what_the_functions_make(tmp_path):
    fields = Fields()
    source = cached(numbers(7), tmp_path, {}, fields.all(), batch_size=3)
    assert fields.sizes == [3, 3, 3]
    assert len(source) == 7
    assert source.num_classes == 3
    for i in range(7):
        np.testing.assert_array_equal(source[i]["latent"], np.full((2, 2, 3), i / 2, np.float32))
        np.testing.assert_array_equal(source[i]["cond"]["text"], np.full((3, 1), i))
        assert source[i]["cond"]["label"] == i


def test_it_is_computed_once_for_each_key(tmp_path):
    fields = Fields()
    names = {cached(numbers(4), tmp_path, key, fields.all(), 4).name for key in ({"a": 1}, {"a": 1}, {"a": 2})}
    names.add(cached(numbers(3), tmp_path, {"a": 1}, fields.all(), 4).name)
    assert len(fields.sizes) == len(names) == len(list(tmp_path.iterdir())) == 3


def test_bad_records_are_left_out_and_captions_stay_with_theirs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        source = cached(numbers(6, bad=(0, 5)), tmp_path, {}, Fields().all(), batch_size=4)
    assert len(source) == 4
    assert list(source.captions) == ["number 1", "number 2", "number 3", "number 4"]
    assert [int(source[i]["cond"]["label"]) for i in range(4)] == [1, 2, 3, 4]
    assert "skipped 2 of the 6 records" in caplog.text


def test_a_failed_run_leaves_nothing(tmp_path):
    def fail(batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cached(numbers(4), tmp_path, {}, {"latent": Fields().latent, "cond": fail}, batch_size=2)
    assert not list(tmp_path.iterdir())


def test_no_good_record_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 records"):
        cached(numbers(2, bad=(0, 1)), tmp_path, {}, Fields().all(), batch_size=2)


def test_random_transforms_are_fixed_by_the_index(tmp_path):
    def draw(record, rng):
        return record | {"draw": rng.random(2)}

    runs = [
        cached(numbers(5), tmp_path / str(run), {}, {"draw": lambda batch: batch["draw"]}, batch_size, draw)
        for run, batch_size in enumerate((2, 5))
    ]
    for i in range(5):
        np.testing.assert_array_equal(runs[0][i]["draw"], runs[1][i]["draw"])


def test_the_loader_reads_it(tmp_path):
    source = cached(numbers(5), tmp_path, {}, Fields().all(), batch_size=2)
    batch = next(loader(source, 2, seed=0))
    assert batch["cond"]["text"].shape == (2, 3, 1)
    np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0] * 2, batch["cond"]["label"])
