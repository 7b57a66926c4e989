"""Any picture becomes the right square, or a bad record that says why."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data.transforms import BadRecord, decode, to_float, to_uint8, variants
from diffusion_jax.data.transforms import crop as crop_to


def encode(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def coordinates(height: int, width: int) -> np.ndarray:
    """A picture whose red is the row and whose green is the column."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


@pytest.mark.parametrize("shape", [(16, 16), (16, 40), (40, 16), (33, 57), (100, 17)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_every_shape_becomes_the_square_and_a_flat_colour_stays(shape, random_crop):
    image = np.full((*shape, 3), (10, 200, 77), np.uint8)
    result = crop_to(16, 16, random_crop=random_crop, flip=True)({"image": image}, np.random.default_rng(0))["image"]
    assert result.dtype == np.uint8
    assert result.shape == (16, 16, 3)
    assert (result == image[0, 0]).all()


def test_centre_crop_takes_the_centre_without_resampling():
    result = crop_to(16, 16)({"image": coordinates(16, 40)}, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(result, coordinates(16, 40)[:, 12:28])


def test_random_crops_are_windows_that_reach_both_ends():
    crop, image = crop_to(16, 16, random_crop=True), coordinates(16, 18)
    rng = np.random.default_rng(0)
    lefts = set()
    for _ in range(50):
        result = crop({"image": image}, rng)["image"]
        left = int(result[0, 0, 1])
        np.testing.assert_array_equal(result, image[:, left : left + 16])
        lefts.add(left)
    assert lefts == {0, 1, 2}


def test_flip_mirrors_about_half():
    flip, image = crop_to(16, 16, flip=True), coordinates(16, 16)
    rng = np.random.default_rng(0)
    results = [flip({"image": image}, rng)["image"] for _ in range(200)]
    mirrored = sum(np.array_equal(result, image[:, ::-1]) for result in results)
    assert mirrored + sum(np.array_equal(result, image) for result in results) == 200
    assert 70 < mirrored < 130


@pytest.mark.parametrize("crops, flip", [(1, False), (1, True), (5, False), (5, True)])
def test_variants_are_all_crops_and_their_mirror_images(crops, flip):
    image = coordinates(16, 40)
    transform = variants(crop_to(16, 16, random_crop=crops > 1), crops, flip)
    record = transform({"image": image, "caption": "a"}, np.random.default_rng(0))
    assert record["caption"] == "a" and record["image"].shape == (crops * (1 + flip), 16, 16, 3)
    lefts = record["image"][:crops, 0, 0, 1]
    for left, result in zip(lefts, record["image"], strict=False):
        np.testing.assert_array_equal(result, image[:, left : left + 16])
    assert len(set(lefts.tolist())) > crops // 2
    if flip:
        np.testing.assert_array_equal(record["image"][crops:], record["image"][:crops, :, ::-1])


def test_small_pictures_are_bad_unless_they_may_be_enlarged():
    record = {"image": coordinates(8, 30)}
    with pytest.raises(BadRecord, match="30x8 pixels, smaller than the 16x16 crop"):
        crop_to(16, 16)(record, np.random.default_rng(0))
    assert crop_to(16, 16, upscale=True)(record, np.random.default_rng(0))["image"].shape == (16, 16, 3)


def test_other_fields_pass():
    result = crop_to(8, 8)({"image": coordinates(8, 8), "caption": "a"}, np.random.default_rng(0))
    assert result["caption"] == "a"


def test_transparent_pixels_are_white():
    assert (decode(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    assert (decode(encode(palette, transparency=0)) == 255).all()


def test_16_bit_grey_keeps_its_high_byte():
    grey = np.array([[0, 0x8000, 0xFFFF]], np.uint16)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(grey)))[0, :, 0], [0, 0x80, 0xFF])


def test_pictures_are_turned_upright():
    tags = Image.Exif()
    tags[0x0112] = 6  # orientation: turn by 90 degrees
    assert decode(encode(Image.new("RGB", (6, 2)), exif=tags)).shape == (6, 2, 3)


def test_truncated_and_foreign_bytes_are_bad():
    good = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)))
    with pytest.raises(BadRecord, match="truncated"):
        decode(good[: len(good) // 2])
    with pytest.raises(BadRecord, match="not a picture of a known format"):
        decode(b"hello")


@pytest.mark.parametrize("xp", [np, jnp])
def test_float_and_back_is_exact(xp):
    levels = xp.arange(256, dtype="uint8")
    floats = to_float(levels)
    assert floats.dtype == "float32"
    assert (float(floats[0]), float(floats[255])) == (-1, 1)
    assert (to_uint8(floats) == levels).all()
    assert to_uint8(xp.array([-3.0, 3.0], "float32")).tolist() == [0, 255]


@pytest.mark.parametrize(
    "width, height, reason", [(1, 40, "32 to 1"), (1_000_000, 1, "32 to 1"), (9600, 9600, "in all")]
)
def test_pictures_that_take_minutes_to_resize_are_bad(width, height, reason):
    with pytest.raises(BadRecord, match=f"{width}x{height} pixels, expected .*{reason}"):
        decode(encode(Image.new("1", (width, height))))
