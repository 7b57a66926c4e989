"""Batches: every record once an epoch, the same for the same seed, shared out between processes, resumable exactly."""

import itertools
import logging

import numpy as np
import pytest

from diffusion_jax.data.loader import loader
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord


def numbers(size: int, bad: tuple[int, ...] = ()) -> Source:
    """Records that hold their own index."""

    def read(index):
        if index in bad:
            raise BadRecord("broken")
        return {"label": index, "caption": str(index), "image": np.full((2, 2, 3), index, np.uint8)}

    return Source("numbers", size, read)


def jitter(record, rng):
    return record | {"draw": np.float32(rng.random())}


def labels(batches) -> list[int]:
    return [int(label) for batch in batches for label in batch["label"]]


def test_an_epoch_is_every_record_once_and_each_has_its_order():
    batches = list(itertools.islice(loader(numbers(12), 4, seed=0), 6))
    first, second = labels(batches[:3]), labels(batches[3:])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_a_transform_draws_anew_in_every_epoch():
    batches = list(itertools.islice(loader(numbers(6), 6, seed=0, transform=jitter), 4))
    by_label = [batch["draw"][np.argsort(batch["label"])] for batch in batches]
    assert len(np.unique(by_label)) == 4 * 6


def test_batches_are_stacked():
    batch = next(loader(numbers(4), 4, seed=0, shuffle=False))
    assert batch["label"].dtype == np.int32
    assert batch["image"].shape == (4, 2, 2, 3)
    assert batch["caption"].tolist() == ["0", "1", "2", "3"]


def test_the_seed_decides():
    def three(seed):
        return list(itertools.islice(loader(numbers(10), 4, seed, transform=jitter), 3))

    same, again, other = three(0), three(0), three(1)
    assert labels(same) == labels(again) != labels(other)
    for a, b in zip(same, again, strict=True):
        np.testing.assert_array_equal(a["draw"], b["draw"])


def test_it_resumes_at_the_very_record():
    original = loader(numbers(10, bad=(3,)), 4, seed=0, transform=jitter)
    for _ in range(4):
        next(original)
    state = original.get_state()
    rest = [next(original) for _ in range(5)]
    resumed = loader(numbers(10, bad=(3,)), 4, seed=0, transform=jitter)
    resumed.set_state(state)
    for expected in rest:
        batch = next(resumed)
        np.testing.assert_array_equal(batch["label"], expected["label"])
        np.testing.assert_array_equal(batch["draw"], expected["draw"])


def test_processes_share_the_batch_of_one():
    whole = loader(numbers(10), 4, seed=0, transform=jitter)
    parts = [loader(numbers(10), 2, seed=0, transform=jitter, process_index=i, process_count=2) for i in range(2)]
    for _ in range(7):
        expected, shares = next(whole), [next(part) for part in parts]
        for i, share in enumerate(shares):
            np.testing.assert_array_equal(share["label"], expected["label"][i::2])
            np.testing.assert_array_equal(share["draw"], expected["draw"][i::2])


def test_without_repeat_it_ends_and_processes_end_together():
    assert labels(loader(numbers(10), 4, seed=0, shuffle=False, repeat=False)) == list(range(8))
    counts = [
        len(list(loader(numbers(9), 2, seed=0, repeat=False, process_index=i, process_count=2))) for i in range(2)
    ]
    assert counts == [2, 2]


def test_bad_records_are_skipped_and_named(caplog):
    bad = tuple(range(0, 30, 2))
    with caplog.at_level(logging.WARNING):
        seen = labels(itertools.islice(loader(numbers(30, bad), 5, seed=0), 9))
    assert set(seen) == set(range(30)) - set(bad)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11
    assert all(line.endswith("of numbers: broken") for line in lines[:10])
    assert lines[10] == "skipped 15 of the 30 records of numbers"


def test_a_source_without_good_records_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 records of numbers can be used"):
        next(loader(numbers(3, bad=(0, 1, 2)), 2, seed=0))


def test_too_few_records_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="numbers has 3 records, too few for 1 x batches of 4"):
        loader(numbers(3), 4, seed=0, repeat=False)
    assert labels([next(loader(numbers(3), 6, seed=0, shuffle=False))]) == [0, 1, 2] * 2
