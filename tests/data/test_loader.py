"""Batches: every record once an epoch, the same for the same seed, shared out between processes, resumable exactly."""

import itertools
import logging

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.loader import loader, one_epoch
from diffusion_jax.data.sources import Source, folder
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
    batch = next(one_epoch(numbers(4), 4))
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


def assert_same(batch, expected):
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values)


def test_it_goes_on_from_any_step():
    whole = list(itertools.islice(loader(numbers(10, bad=(3,)), 4, seed=0, transform=jitter), 9))
    for start in (1, 4, 7):  # within an epoch, and after one that ends within a batch
        resumed = loader(numbers(10, bad=(3,)), 4, seed=0, transform=jitter, start=start)
        for expected in whole[start:]:
            assert_same(next(resumed), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_shares_the_same_batches(processes):
    def of_process(i, start):
        share = {"process_index": i, "process_count": processes, "start": start}
        return loader(numbers(10, bad=(3, 4)), 4 // processes, seed=0, transform=jitter, **share)

    whole = list(itertools.islice(loader(numbers(10, bad=(3, 4)), 4, seed=0, transform=jitter), 7))
    for start in (0, 3):
        parts = [of_process(i, start) for i in range(processes)]
        for expected in whole[start:]:
            shares = [next(part) for part in parts]
            assert_same({name: np.concatenate([share[name] for share in shares]) for name in expected}, expected)


def test_one_epoch_has_every_good_record():
    assert labels(one_epoch(numbers(10), 4)) == list(range(10))
    assert labels(one_epoch(numbers(4, bad=(2,)), 4)) == [0, 1, 3]
    assert labels(one_epoch(numbers(9, bad=(2,)), 4)) == [0, 1, 3, 4, 5, 6, 7, 8]
    shuffled = labels(one_epoch(numbers(8), 4, seed=1))
    assert sorted(shuffled) == list(range(8)) != shuffled


def test_bad_records_are_skipped_and_named(caplog):
    bad = tuple(range(0, 30, 2))
    with caplog.at_level(logging.WARNING):
        seen = labels(itertools.islice(loader(numbers(30, bad), 5, seed=0), 9))
    assert set(seen) == set(range(30)) - set(bad)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 11
    assert all(line.endswith("of numbers: broken") for line in lines[:10])
    assert lines[10] == "skipped 15 of the 30 records of numbers"


def test_a_picture_deleted_during_training_is_skipped(tmp_path, caplog):
    for shade in range(20):
        Image.fromarray(np.full((2, 2, 3), shade, np.uint8)).save(tmp_path / f"{shade}.png")
    batches = loader(folder(tmp_path), 4, seed=0)
    next(batches)
    (tmp_path / "7.png").unlink()
    with caplog.at_level(logging.WARNING):
        later = list(itertools.islice(batches, 60))[-10:]  # two epochs, behind what was read ahead
    shades = {int(image.max()) for batch in later for image in batch["image"]}
    assert 7 not in shades and len(shades) > 10
    assert f"skipped {tmp_path}/7.png: " in caplog.text
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"none of the 20 records of .* can be used"):
        list(itertools.islice(batches, 60))


def test_a_source_without_good_records_is_an_error():
    with pytest.raises(ValueError, match="none of the 3 records of numbers can be used"):
        next(loader(numbers(3, bad=(0, 1, 2)), 2, seed=0))


def test_too_few_records_are_an_error():
    with pytest.raises(ValueError, match="numbers has 3 records, too few for batches of 4"):
        one_epoch(numbers(3), 4)
    with pytest.raises(ValueError, match="numbers is empty: it has no records"):
        loader(numbers(0), 4, seed=0)


def test_a_batch_may_be_larger_than_an_epoch():
    assert sorted(labels([next(loader(numbers(3), 6, seed=0))])) == [0, 0, 1, 1, 2, 2]
