"""The order of records: each once an epoch, by weight, within windows of blocks, a function of seed and position."""

import itertools
from fractions import Fraction

import numpy as np
import pytest

from diffusion_jax.data.order import WINDOW, Part, endless, one_pass, replacement, selected

SIZES = (5, 1, 7, 3, 4, 4, 9, 2, 6, 5, 8)
BLOCK_OF = np.repeat(np.arange(len(SIZES)), SIZES)
TOTAL = sum(SIZES)


def epoch(order, number, size=TOTAL):
    return [order[number * size + position] for position in range(size)]


def test_blocks_are_read_in_windows_and_every_record_once_an_epoch():
    announced = []
    order = endless((Part(TOTAL, blocks=SIZES, announce=announced.append),), seed=3)
    first, second = epoch(order, 0), epoch(order, 1)
    assert sorted(first) == sorted(second) == list(range(TOTAL)) and first != second
    seen = list(dict.fromkeys(BLOCK_OF[first].tolist()))
    for start in range(0, len(SIZES), WINDOW):
        window = set(seen[start : start + WINDOW])
        places = [place for place, record in enumerate(first) if BLOCK_OF[record] in window]
        assert places == list(range(places[0], places[-1] + 1))
        inside = BLOCK_OF[[first[place] for place in places]]
        assert (np.diff(inside) != 0).sum() > len(window)  # not one block after the other
        assert any(set(blocks[: len(window)]) == window for blocks in announced)
    for blocks, following in itertools.pairwise(announced[:4]):  # what follows is announced one window ahead
        assert set(following[:WINDOW]) & set(blocks[-WINDOW:])
    assert seen != list(dict.fromkeys(BLOCK_OF[second].tolist()))
    windows = [{BLOCK_OF[record] for record in of_epoch[: 3 * WINDOW]} for of_epoch in (first, second)]
    assert windows[0] != windows[1]  # blocks meet others in every epoch
    again = endless((Part(TOTAL, blocks=SIZES),), seed=3)
    assert [again[position] for position in (2 * TOTAL - 1, 3)] == [second[-1], first[3]]
    assert epoch(endless((Part(TOTAL, blocks=SIZES),), seed=4), 0) != first


@pytest.mark.parametrize("weights", [("0.7", "0.3"), ("1", "2", "0.125"), ("0.001", "0.999")])
def test_parts_are_drawn_exactly_by_weight_and_each_in_epochs_of_its_own(weights):
    weights = [Fraction(weight) for weight in weights]
    sizes = [7, TOTAL, 11][: len(weights)]
    parts = [Part(size, weight, SIZES if size == TOTAL else ()) for size, weight in zip(sizes, weights, strict=True)]
    order = endless(parts, seed=0)
    ends = np.cumsum(sizes)
    drawn = [order[position] for position in range(4000)]
    numbers = np.searchsorted(ends, drawn, side="right")
    for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        counts = np.cumsum(numbers == number)
        exact = np.arange(1, 4001) * float(weight / sum(weights))
        assert np.abs(counts - exact).max() <= len(weights) - 1
        own = [record - (ends[number] - size) for record in np.array(drawn)[numbers == number]]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))


def test_one_pass_has_every_record_of_all_parts():
    plain, blocks = Part(6), Part(TOTAL, blocks=SIZES)
    for parts in ((plain,), (blocks,), (plain, blocks), (plain, plain)):
        size = sum(part.size for part in parts)
        order = one_pass(parts, seed=1)
        records = [order[position] for position in range(len(order))]
        assert sorted(records) == list(range(size)) != records


def test_a_bad_record_is_replaced_from_its_own_block_and_part_first():
    parts, rng = (Part(10), Part(TOTAL, blocks=SIZES), Part(3)), np.random.default_rng(0)
    bad = 10 + 14  # in the block of 3 to 16
    near = {replacement(parts, bad, attempt % 10, rng) for attempt in range(200)}
    assert near == {10 + record for record in range(TOTAL) if BLOCK_OF[record] == BLOCK_OF[14]}
    assert {replacement(parts, bad, 10, rng) for _ in range(2000)} == set(range(10, 10 + TOTAL))
    assert {replacement(parts, bad, 100, rng) for _ in range(2000)} == set(range(13 + TOTAL))


def test_what_remains_of_parts_keeps_their_weights():
    parts = (Part(4, Fraction(2)), Part(3, Fraction(1), blocks=(1, 2)))
    kept = selected(parts, np.array([0, 3, 5]))
    assert [(part.size, part.weight, part.blocks) for part in kept] == [(2, 2, ()), (1, 1, ())]
    with pytest.raises(ValueError, match="none of the 3 records of source 2 can be used"):
        selected(parts, np.array([0, 3]))
