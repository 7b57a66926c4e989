"""Pictures of several shapes: which size each is trained in, and in which order sizes come."""

import functools
import io
import itertools
from fractions import Fraction

import numpy as np
import pytest
from PIL import ExifTags, Image

from diffusion_jax.data import order, sources
from diffusion_jax.data.buckets import assigned, chosen, in_turn, shapes, shares, sizes
from diffusion_jax.data.crops import crop
from diffusion_jax.data.loader import loader
from diffusion_jax.data.mixture import mixed
from diffusion_jax.data.shards import shards
from diffusion_jax.data.transforms import BadRecord, decode, size_of
from tests.data import odd
from tests.data.test_transforms import with_chunk


def test_the_sizes_of_sdxl_are_among_those_it_was_trained_in():
    """Podell et al. 2023, appendix I."""
    wider = [(960, 1088), (896, 1152), (832, 1216), (768, 1280), (768, 1344), (704, 1408), (704, 1472), (640, 1536)]
    assert shapes(1024, 8, 32) == [(1024, 1024), *wider, *((width, height) for height, width in wider)]


@pytest.mark.parametrize("side, count, step", [(1024, 16, 32), (512, 6, 64), (32, 5, 4), (8, 1, 4)])
def test_sizes_are_multiples_and_as_large_as_the_square_lets_them_be(side, count, step):
    of_all = shapes(side, count, step)
    assert len(set(of_all)) == 1 + 2 * count
    unit = min(width for _, width in of_all if width > side) - side
    for height, width in of_all[1:]:
        assert height % step == width % step == 0 and height * width <= side**2
        assert (min(height, width) + unit) * max(height, width) > side**2


def test_more_sizes_than_there_are_is_one_line():
    with pytest.raises(ValueError, match=r"config\.data\.buckets must be at most 2 for images of 8 pixels, got 3"):
        shapes(8, 3, 4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_headers_tell_the_size_of_the_upright_picture(form, orientation):
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (12, 9)).save(file, form, exif=exif)
    assert tuple(size_of(file.getvalue())) == decode(file.getvalue()).shape[:2]


def test_a_tag_after_the_pixels_turns_too():
    file, exif = io.BytesIO(), Image.Exif()
    Image.new("RGB", (12, 9)).save(file, "PNG")
    exif[ExifTags.Base.Orientation] = 6
    png = file.getvalue()
    end = png.rindex(b"IEND") - 4
    chunk = with_chunk(png, b"eXIf", exif.tobytes()[6:])[33 : 33 + len(exif.tobytes()[6:]) + 12]
    late = png[:end] + chunk + png[end:]
    assert decode(late).shape == (12, 9, 3) and size_of(late).tolist() == [12, 9]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_sizes_of_odd_pictures_are_those_of_their_pixels_and_read_once(kind, tmp_path):
    source = sources.folder(odd.captioned_folder(tmp_path / "a")) if kind == "folder" else None
    if kind == "tar":
        source = shards("tar", str(odd.tars(tmp_path / "a")), tmp_path, 1e9)
    elif kind == "parquet":
        source = shards("parquet", str(odd.parquets(tmp_path / "a")), tmp_path, 1e9)
    measured = sizes(source, tmp_path)
    good = 0
    for index, (height, width) in enumerate(measured):
        try:
            assert source[index]["image"].shape[:2] == (height, width)
            good += 1
        except BadRecord:
            continue
    assert good > 150 and len(np.unique(measured, axis=0)) >= 2
    unread = sources.replace(source, measure=None)
    np.testing.assert_array_equal(sizes(unread, tmp_path), measured)


def test_pictures_go_to_the_nearest_ratio_and_few_ones_join_the_next():
    of = [(8, 8), (4, 12), (12, 4)]
    measured = np.array([[100, 100], [100, 130], [100, 290], [0, 0], [500, 100], [30, 100], [99, 99]])
    assert {shape: group.tolist() for shape, group in assigned(measured, of, 1, "a").items()} == {
        (8, 8): [0, 1, 6],
        (4, 12): [2, 5],
        (12, 4): [4],
    }
    joined = assigned(measured, of, 2, "a")
    assert {shape: group.tolist() for shape, group in joined.items()} == {(8, 8): [0, 1, 4, 6], (4, 12): [2, 5]}
    with pytest.raises(ValueError, match="none of the 2 records of a can be used"):
        assigned(np.zeros((2, 2), int), of, 2, "a")


@pytest.mark.parametrize("weights", [[5, 3, 1], [1], [7, 7, 7], [1000, 3, 40, 1]])
def test_each_has_exactly_its_share_spread_evenly(weights):
    counts, total = np.zeros(len(weights), int), sum(weights)
    for position in range(2 * total):
        number, before = order.turn(position, weights)
        assert before == counts[number]
        counts[number] += 1
        assert np.abs(counts - (position + 1) * np.array(weights) / total).max() < len(weights)
        if (position + 1) % total == 0:
            assert (counts == (position + 1) // total * np.array(weights)).all()


def numbered(sizes) -> list[sources.Source]:
    """A source for each number of records, whose pictures have a level of their own and the width of their source."""

    def read(start, width):
        return lambda index: {"image": np.full((8, width, 3), start + index, np.uint8)}

    starts = itertools.accumulate([0, *sizes])
    return [
        sources.Source(f"s{i}", size, read(start, 8 + 4 * i))
        for i, (start, size) in enumerate(zip(starts, sizes, strict=False))
    ]


def batches(parts, process_index=0, process_count=1, start=0):
    def of(source):
        size, shape = 4 // process_count, source[0]["image"].shape[:2]
        return lambda step: loader(source, size, 0, crop(*shape), step, process_index, process_count)

    return in_turn([of(source) for source in parts], [len(source) for source in parts])(start)


def pixels(batch) -> list:
    return batch["image"][:, 0, :, 0].tolist()


def test_a_resumed_run_and_several_hosts_see_the_same_batches():
    parts = numbered([20, 12, 5])
    whole = [pixels(batch) for batch in itertools.islice(batches(parts), 40)]
    assert {len(batch[0]) for batch in whole} == {8, 12, 16}
    for start in (1, 7, 38):
        assert [pixels(batch) for batch in itertools.islice(batches(parts, start=start), 40 - start)] == whole[start:]
    hosts = [itertools.islice(batches(parts, process, 2, start=3), 10) for process in range(2)]
    assert [pixels(a) + pixels(b) for a, b in zip(*hosts, strict=True)] == whole[3:13]


def test_some_records_of_blocks_are_all_drawn_once_an_epoch():
    announced = []
    part = order.Part(12, blocks=(4, 3, 5), announce=announced.append)
    (some,) = order.within([part], np.array([1, 3, 8, 9]))
    assert some.size == 4 and list(some.blocks) == [2, 2]
    drawn = order.endless((some,), 0)
    assert sorted(drawn[i] for i in range(4)) == sorted(drawn[i] for i in range(4, 8)) == [0, 1, 2, 3]
    assert {number for numbers in announced for number in numbers} == {0, 2}


def test_a_mixture_in_several_sizes_keeps_its_weights(tmp_path):
    """Of the first source one in four is wide, and of the second, drawn nine times as often, one in two."""

    def measured(name, start, wide, count):
        def read(index):
            return {"image": np.full((8, 16 if index in wide else 8, 3), start + index, np.uint8)}

        return sources.Source(name, count, read, measure=lambda index: np.array(read(index)["image"].shape[:2]))

    terms = [measured("a", 0, range(2), 8), measured("b", 100, range(10), 20)]
    mixture = mixed(terms, [Fraction(1), Fraction(9)])
    groups = assigned(sizes(mixture, tmp_path), [(8, 8), (8, 16)], 1, "a")
    parts = [chosen(mixture, indices) for indices in groups.values()]
    weights = shares(parts, [len(part) for part in parts])
    assert [weight * sum([1 / 4 + 9 / 2, 3 / 4 + 9 / 2]) for weight in weights] == [
        pytest.approx(sum(weights) * share) for share in (3 / 4 + 9 / 2, 1 / 4 + 9 / 2)
    ]
    loaders = [functools.partial(loader, part, 10, 0, crop(*part[0]["image"].shape[:2])) for part in parts]
    levels = [batch["image"][:, 0, 0, 0] for batch in itertools.islice(in_turn(loaders, weights)(0), sum(weights))]
    assert (np.concatenate(levels) < 100).mean() == pytest.approx(0.1, abs=0.01)
    with pytest.raises(ValueError, match="none of the 20 records of source 2 can be used"):
        order.check(mixture.parts, np.arange(8))
    few = order.within(mixture.parts, np.array([0, 1, 10]))
    assert [part.size for part in order.selected(few, np.array([2]))] == [1]  # others are used in another size


def test_chosen_records_keep_their_captions_and_names(tmp_path):
    source = sources.folder(odd.captioned_folder(tmp_path / "a"))
    some = chosen(source, np.array([3, 7, 11]))
    assert len(some) == 3 and some.captions[1] == source.captions[7] and some.describe(2) == source.describe(11)
    np.testing.assert_array_equal(some[0]["image"], source[3]["image"])
    assert some.name != chosen(source, np.array([3, 7, 12])).name
