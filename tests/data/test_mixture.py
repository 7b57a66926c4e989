"""A mixture draws from its sources by weight, keeps what they share, and refuses what does not fit."""

import contextlib
import itertools
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import digits
from diffusion_jax import build
from diffusion_jax.data.cache import Cache
from diffusion_jax.data.loader import loader
from diffusion_jax.data.mixture import mixed
from diffusion_jax.data.sources import Source
from diffusion_jax.data.transforms import BadRecord
from tests.data import odd


def numbers(name, start, size, captions=True, bad=(), **others):
    def read(index):
        if index in bad:
            raise BadRecord("broken")
        image = np.full((8, 8, 3), start + index, np.uint8)
        return {"image": image, "style": name} | ({"caption": f"{name} {index}"} if captions else {})

    return Source(name, size, read, captions=[f"{name} {i}" for i in range(size)] if captions else (), **others)


def drawn(source, count, **options):
    levels = []
    for batch in itertools.islice(loader(source, 10, seed=5, **options), count // 10):
        levels += batch["image"][:, 0, 0, 0].tolist()
    return levels


def test_weights_are_exact_and_bad_records_do_not_change_them():
    source = mixed([numbers("a", 0, 7, bad=(2, 3)), numbers("b", 100, 50)], [Fraction("0.7"), Fraction("0.3")])
    levels = drawn(source, 1000)
    assert sum(level < 100 for level in levels) == 700
    assert set(levels) == {0, 1, 4, 5, 6, *range(100, 150)}
    assert max(Counter(level for level in levels if level >= 100).values()) == 6  # 300 of 50 in whole epochs
    halves = [drawn(source, 500, process_index=host, process_count=2, start=5) for host in range(2)]
    together = np.stack([np.reshape(half, (-1, 10)) for half in halves], axis=1).ravel()
    assert together[:900].tolist() == levels[100:]  # they began at their fifth step, of twenty records


def test_a_mixture_has_what_its_sources_share():
    a, b = numbers("a", 0, 3), numbers("b", 100, 2)
    source = mixed([a, b], [Fraction(1), Fraction(1)])
    assert len(source) == 5 and list(source.captions) == ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert source[3].keys() == {"image", "caption", "original"} and source[3]["caption"] == "b 0"
    assert source.describe(4) == "record 1 of b"
    several = Source("c", 1, a.read, captions=[("one", "two")])
    assert list(mixed([b, several], [Fraction(1)] * 2).captions) == [("b 0",), ("b 1",), ("one", "two")]
    with pytest.raises(ValueError, match=r"^a has captions \(record 0 of a\) and d has none \(record 0 of d\): "):
        mixed([a, numbers("d", 0, 2, captions=False)], [Fraction(1)] * 2)


def labelled(name, labels, classes=(), num_classes=0, **others):
    records = [{"image": np.zeros((8, 8, 3), np.uint8), "label": label} for label in labels]
    count = num_classes or len(classes)
    return Source(name, len(labels), records.__getitem__, num_classes=count, classes=classes, **others)


def test_classes_with_names_are_merged_by_name():
    a, b = labelled("a", [0, 1], ["cat", "zebra"]), labelled("b", [1, 0], ["dog", "cat"])
    source = mixed([a, b], [Fraction(1)] * 2)
    assert source.classes == ["cat", "dog", "zebra"] and source.num_classes == 3
    assert [record["label"] for record in source] == [0, 2, 0, 1]
    again = mixed([source, labelled("c", [0], ["ant"])], [Fraction(1)] * 2)
    assert [record["label"] for record in again] == [1, 3, 1, 2, 0]


def test_classes_without_names_are_merged_by_number():
    source = mixed([labelled("a", [0, 1], num_classes=2), labelled("b", [4], num_classes=5)], [Fraction(1)] * 2)
    assert source.num_classes == 5 and not source.classes and [record["label"] for record in source] == [0, 1, 4]


@pytest.mark.parametrize("other", [labelled("b", [0], num_classes=1), numbers("b", 0, 1, captions=False)])
def test_classes_that_do_not_fit_are_left_out_with_a_line(other, caplog):
    source = mixed([labelled("a", [0], ["cat"]), other], [Fraction(1)] * 2)
    assert source.num_classes == 0 and not source.classes and "label" not in source[0]
    what = "names of classes" if other.num_classes else "classes"
    line = f"mix: classes are not used: a has {what} (record 0 of a) and b has none (record 0 of b)"
    assert [record.getMessage() for record in caplog.records] == [line]


def test_a_cached_mixture_keeps_its_weights(tmp_path):
    source = mixed([numbers("a", 0, 4, bad=(1,)), numbers("b", 100, 40)], [Fraction(9), Fraction(1)])
    cache = Cache(source, tmp_path, {}, {"image": lambda batch: batch["image"][:, None]}, 8)
    cache.build(cache.missing())
    levels = drawn(cache.source(), 200)
    assert sum(level < 100 for level in levels) == 180 and 1 not in levels


def source_of(tmp_path, text):
    config = digits.get_config()
    config.data.source, config.data.cache = text, str(tmp_path / "cache")
    return build.data.source(config, "train", 8)


def test_the_text_of_a_mixture_may_have_commas_and_pluses(tmp_path):
    for name, start in (("a,b + c", 0), ("train", 100)):
        (tmp_path / name).mkdir()
        for number in range(3):
            (tmp_path / name / f"{number}.png").write_bytes(odd.solid(start + number))
    odd.write_tar(tmp_path / "a,1.tar", [("1.png", odd.solid(200))])
    terms = f"0.5*folder:{tmp_path}/a,b + c + .25*folder:{tmp_path}/{{split}} + 0.25*tar:{tmp_path}/a,*.tar"
    source = source_of(tmp_path, f"mix:{terms}")
    levels = drawn(source, 400)
    assert [sum(level // 100 == part for level in levels) for part in range(3)] == [200, 100, 100]


@pytest.mark.parametrize(
    "terms, term",
    [
        ("", ""),
        ("folder:a", "folder:a"),
        ("0*digits", "0*digits"),
        ("1*mix:1*digits", "1*mix:1*digits"),
        ("0.5*tar:a + x*folder:b", "x*folder:b"),
        ("0.5*tar:a + -1*folder:b", "-1*folder:b"),
        ("0.5*tar:a+nan*digits", "nan*digits"),
        ("0.5*tar:a + 50%*folder:b", "50%*folder:b"),
        ("0.5*tar:a + 1e-1*folder:b", "1e-1*folder:b"),
        ("0.5*tar:a + folder:b", "folder:b"),
        ("0.5*tar:a + 0.5folder:b", "0.5folder:b"),
        ("0.5*tar:a + 0.5*", "0.5*"),
        ("0.5*tar:a + + 0.5*folder:b", "0.5*tar:a +"),
        ("0.5*tar:a +", "0.5*tar:a +"),
        (" + 0.5*folder:b", ""),
    ],
)
def test_a_mixture_in_another_form_is_one_line_that_names_the_term(terms, term, tmp_path):
    expected = f"mix: expected 0.7*SOURCE + 0.3*SOURCE, with weights above 0, got the term {term!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        source_of(tmp_path, f"mix:{terms}")


@pytest.mark.parametrize("terms", ["1*digits + 1*Digits", "1*digits + 1*folders:a"])
def test_an_unknown_source_of_a_mixture_is_named(terms, tmp_path):
    with pytest.raises(ValueError, match=rf"^unknown data source '{terms[12:]}'"):
        source_of(tmp_path, f"mix:{terms}")


def test_spaces_between_the_parts_of_a_mixture_are_free(tmp_path):
    for name, start in (("a+", 0), ("b", 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(odd.solid(start))
    a, b = f"folder:{tmp_path}/a+", f"folder:{tmp_path}/b"
    for terms in (f"1*{a}+3*{b}", f" 1 * {a}  + 3 *{b} "):
        assert drawn(source_of(tmp_path, f"mix:{terms}"), 40).count(100) == 30


def parquets(folder, shards):
    """Returns the bytes of the largest one."""
    folder.mkdir()
    for number in range(shards):
        pictures = [odd.solid(number) + bytes([row]) * 1000 for row in range(20)]  # no two alike
        pq.write_table(pa.table({"jpg": pictures}), folder / f"{number:02}.parquet", compression=None)
    return max(file.stat().st_size for file in folder.iterdir())


def size_of(file):
    """Bytes of a file that may be removed or renamed now."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_size
    return 0


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files")
def test_the_sources_of_a_mixture_share_the_room_for_copies(tmp_path):
    size = max(parquets(tmp_path / name, 24) for name in "ab")
    config = digits.get_config()
    config.data.source = f"mix:0.9*parquet:{tmp_path}/a/*.parquet + 0.1*parquet:{tmp_path}/b/*.parquet"
    config.data.cache, config.data.cache_gb = str(tmp_path / "cache"), 15 * size / 1e9
    expected = r"for the 8 shards in .*/a that are in use at a time, as much for each of 2 sources, got"
    with pytest.raises(ValueError, match=expected):
        build.data.source(config, "train", 8)
    config.data.cache_gb = 20 * size / 1e9
    source = build.data.source(config, "train", 8)
    most, mapped = 0, 0
    for _ in itertools.islice(loader(source, 10, seed=0), 100):
        most = max(most, sum(map(size_of, (tmp_path / "cache" / "shards").glob("*/*"))))
        lines = Path("/proc/self/maps").read_text().splitlines()
        mapped = max(mapped, len({line.split()[5] for line in lines if f"{tmp_path}/cache/shards" in line}))
    assert 18 * size < most <= 20 * size
    assert mapped <= 20 + 8  # a window of four of each source more than fit
