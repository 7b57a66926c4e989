"""A mixture draws from its sources by weight, keeps what they share, and refuses what does not fit."""

import itertools
from collections import Counter
from fractions import Fraction

import numpy as np
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


@pytest.mark.parametrize("text", ["mix:", "mix:folder:a", "mix:0*digits", "mix:1*digits + x", "mix:1*mix:1*digits"])
def test_a_mixture_in_another_form_is_one_line(text, tmp_path):
    with pytest.raises(
        ValueError, match=r"^(mix: expected 0.7\*SOURCE \+ 0.3\*SOURCE, .*|unknown data source 'digits \+ x'.*)$"
    ):
        source_of(tmp_path, text)
