"""A cache has the outputs of its functions, and is never half written."""

import itertools
import logging
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import paths
from diffusion_jax.data import cache as cache_module
from diffusion_jax.data import cache_files
from diffusion_jax.data.cache import Cache
from diffusion_jax.data.loader import loader, stack
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord
from tests import disk


def numbers(size: int, bad: tuple[int, ...] = ()) -> Source:
    """Records that hold their own index."""

    def read(index):
        if index in bad:
            raise BadRecord("broken")
        return {"image": np.full((2, 2, 3), index, np.uint8), "label": index}

    return Source(f"{size} numbers", size, read, num_classes=3, captions=[f"number {i}" for i in range(size)])


def cached(*arguments, **named) -> Source:
    cache = Cache(*arguments, **named)
    cache.build(cache.missing())
    return cache.source()


class Fields:
    """Functions of a batch that remember the sizes of the batches they saw."""

    def __init__(self):
        self.sizes = []

    def latent(self, batch):
        self.sizes.append(len(batch["label"]))
        return batch["image"].astype(np.float32)[:, None] / 2

    def cond(self, batch):
        return {"text": np.ones((1, 3, 1)) * batch["label"][:, None, None, None], "label": batch["label"][:, None]}

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


def files(folder: Path) -> dict[str, bytes]:
    """The content of all files of a folder, by path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of four records."""
    monkeypatch.setattr(cache_files, "UNIT", 4)


def failing_at(record: int, error: Exception):
    def fail(batch):
        if record in batch["label"]:
            raise error
        return batch["label"][:, None]

    return fail


def test_a_stopped_build_goes_on_to_the_same_files(tmp_path, small_shards):
    """Bad records at the ends of shards, a whole shard of them, and a field that fails in the middle of a shard."""
    source, whole, parts = numbers(23, bad=(0, 3, *range(8, 12), 22)), Fields(), Fields()
    expected = cached(source, tmp_path / "whole", {}, whole.all() | {"label": failing_at(-1, None)}, 3)
    for record in (5, 18):
        fields = parts.all() | {"label": failing_at(record, RuntimeError("out of memory"))}
        with pytest.raises(RuntimeError, match="out of memory"):
            cached(source, tmp_path / "parts", {}, fields, 3)
    assert not list(tmp_path.rglob("*.partial"))
    again = cached(source, tmp_path / "parts", {}, parts.all() | {"label": failing_at(-1, None)}, 3)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert len(parts.sizes) == len(whole.sizes) + 1 + 1, "each failure repeats no more than the batches of its shard"
    assert [int(again[i]["label"]) for i in range(len(again))] == [
        i for i in range(23) if i not in (0, 3, 8, 9, 10, 11, 22)
    ]
    assert again.name == expected.name and again.captions[3] == "number 5"


def test_any_rows_are_read_at_once(tmp_path, small_shards):
    source = cached(numbers(23, bad=(0, 3, *range(8, 12), 22)), tmp_path, {}, Fields().all(), 3)
    rows = np.random.default_rng(0).integers(0, len(source), 40)
    batch = source.read_batch(rows, np.zeros(len(rows)))
    jax.tree.map(np.testing.assert_array_equal, batch, stack([source[int(row)] for row in rows]))


def test_a_draw_decides_the_version(tmp_path):
    source = cached(numbers(6), tmp_path, {}, {"label": lambda batch: batch["label"][:, None] + [0, 100, 200]}, 4)
    batch = source.read_batch(np.array([5, 0, 5, 5]), np.array([0.0, 0.34, 0.66, 0.67]))
    assert batch["label"].tolist() == [5, 100, 105, 205]
    versions = [batch["label"] // 100 for batch in itertools.islice(loader(source, 6, seed=0), 50)]
    assert np.bincount(np.concatenate(versions)).min() > 70


def test_processes_share_the_same_batches_of_it(tmp_path, small_shards):
    fields = {"label": lambda batch: batch["label"][:, None] + [0, 100, 200]}
    source = cached(numbers(10, bad=(3,)), tmp_path, {}, fields, 4)
    whole = [batch["label"] for batch in itertools.islice(loader(source, 4, seed=0), 7)]
    for start in (0, 3):
        halves = [loader(source, 2, seed=0, start=start, process_index=i, process_count=2) for i in range(2)]
        for expected in whole[start:]:
            np.testing.assert_array_equal(np.concatenate([next(half)["label"] for half in halves]), expected)


def test_halves_of_floats_come_back_with_their_type(tmp_path):
    values = np.linspace(-3, 3, 8).astype(jnp.bfloat16).reshape(2, 1, 4)
    source = cached(numbers(2), tmp_path, {}, {"latent": lambda batch: values[batch["label"]]}, 1)
    assert source[1]["latent"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(source[1]["latent"], values[1, 0])


@pytest.mark.parametrize("file", ["latent/00001-of-00003.npy", "index/00001-of-00003.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_shard_is_computed_again(tmp_path, small_shards, caplog, file, damage):
    fields = Fields()
    cached(numbers(11), tmp_path, {}, fields.all(), 4)
    before, computed = files(tmp_path), len(fields.sizes)
    (damaged,) = tmp_path.glob(f"*/{file}")
    os.truncate(damaged, damaged.stat().st_size - 1 if damage == "cut" else 0)
    with caplog.at_level(logging.WARNING):
        cached(numbers(11), tmp_path, {}, fields.all(), 4)
    assert files(tmp_path) == before and len(fields.sizes) == computed + 1
    assert "00001-of-00003.json is computed again: it is damaged" in caplog.text


def test_a_cache_of_another_form_is_not_read(tmp_path, monkeypatch):
    fields = Fields()
    cached(numbers(3), tmp_path, {}, fields.all(), 4)
    monkeypatch.setattr(cache_module, "VERSION", 1)
    cached(numbers(3), tmp_path, {}, fields.all(), 4)
    assert len(fields.sizes) == 2


def test_what_killed_processes_left_is_removed(tmp_path):
    cached(numbers(3), tmp_path, {}, Fields().all(), 4)
    (key,) = tmp_path.iterdir()
    old, new = (key / "latent" / f"00000-of-00001.npy.{name}.partial" for name in ("00", "11"))
    folder = tmp_path / "building-x"
    folder.mkdir()
    for file in (old, new, folder / "latent.npy"):
        file.touch()
    for path in (old, folder / "latent.npy", folder):
        os.utime(path, (0, time.time() - 2 * cache_module.STALE))
    cached(numbers(3), tmp_path, {}, Fields().all(), 4)
    assert not old.exists() and not folder.exists() and new.exists()


def test_size_and_time_are_told(tmp_path, small_shards, caplog):
    with caplog.at_level(logging.INFO):
        cached(numbers(10), tmp_path, {}, Fields().all(), 4)
    # a latent of 2 x 2 x 3 float32, a text of 3 float64, a label of int32
    assert f"caching 10 records of 10 numbers, 0.8 kB, in {tmp_path}" in caplog.text
    assert caplog.text.count("caching 10 records") == caplog.text.count("the rest of the cache takes about 0:00:0") == 1


def test_a_disk_without_room_is_one_line_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "free_space", lambda folder: 700)
    fields = Fields()
    with pytest.raises(OSError, match=r"^the cache of 10 numbers needs 0\.8 kB, and .* has room for 0\.7 kB: make"):
        cached(numbers(10), tmp_path, {}, fields.all(), 4)
    assert len(fields.sizes) == 1


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of its own, of 1 MiB. Call it to resize that."""
    with disk.of_size(tmp_path / "disk", "1m") as resize:
        yield tmp_path / "disk", resize


def test_a_full_disk_is_one_line_and_costs_one_shard(tmp_path, small_shards, small_disk, monkeypatch):
    monkeypatch.setattr(paths, "free_space", lambda folder: 10**9)  # as if others filled it meanwhile
    (folder, resize), sizes = small_disk, []

    def latent(batch):
        sizes.append(len(batch["label"]))
        return np.zeros((len(batch["label"]), 1, 80_000), np.uint8) + batch["label"][:, None, None].astype(np.uint8)

    with pytest.raises(OSError) as error:
        cached(numbers(20), folder, {}, {"latent": latent}, 4)
    line = r"could not write to the cache .*\(No space left on device\): its finished shards are kept; make room or .*"
    assert re.fullmatch(line, str(error.value))
    assert not list(folder.rglob("*.partial")) and len(list(folder.rglob("index/*"))) == 3 == len(sizes) - 1
    resize("4m")
    cached(numbers(20), folder, {}, {"latent": latent}, 4)
    assert len(sizes) == 4 + 2
    cached(numbers(20), tmp_path / "undisturbed", {}, {"latent": latent}, 4)
    assert files(folder) == files(tmp_path / "undisturbed")


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
