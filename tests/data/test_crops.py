"""What was done to a picture is told exactly: its size in the file, the corner of the crop, the size of the crop."""

import io

import numpy as np
import pytest
from PIL import ExifTags, Image

from diffusion_jax.data.crops import crop, variants
from diffusion_jax.data.transforms import picture

SIDE = 128
NOISE = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
RESIZED = np.asarray(Image.fromarray(NOISE).resize((192, SIDE), Image.Resampling.LANCZOS)).astype(int)


def is_part(image, whole, sizes) -> bool:
    """Whether the crop is that part of the whole picture."""
    top, left, height, width = sizes[2:]
    return np.abs(whole[top : top + height, left : left + width] - image).max() <= 1


def is_mirrored(image, sizes) -> bool:
    """Whether it is that part of the mirror image; else it must be that of the picture."""
    mirrored = is_part(image, RESIZED[:, ::-1], sizes)
    assert mirrored != is_part(image, RESIZED, sizes)
    return mirrored


def test_the_sizes_of_a_crop_are_those_of_its_pixels():
    cropped, seen = crop(SIDE, SIDE, random_crop=True, flip=True), []
    for seed in range(20):
        record = cropped({"image": NOISE, "caption": "a"}, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        _, left = rng.integers(0, [1, 65])
        seen.append(rng.random() < 0.5)
        assert record["sizes"].tolist() == [200, 300, 0, 64 - left if seen[-1] else left, SIDE, SIDE]
        assert is_mirrored(record["image"], record["sizes"]) == seen[-1]
        assert record["sizes"].dtype == np.int32 and record["caption"] == "a"
    assert 5 < sum(seen) < 15


def test_the_sizes_of_variants_are_those_of_each():
    made = variants(crop(SIDE, SIDE, random_crop=True), 4, flip=True)
    record = made({"image": NOISE, "original": np.int32([2000, 3000])}, np.random.default_rng(0))
    assert record["sizes"].shape == (8, 6) and len(np.unique(record["sizes"], axis=0)) > 4
    assert (record["sizes"][:, :2] == [2000, 3000]).all()
    mirrored = [is_mirrored(*pair) for pair in zip(record["image"], record["sizes"], strict=True)]
    assert mirrored == [False] * 4 + [True] * 4


def encoded(form: str, orientation: int) -> bytes:
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(np.resize(NOISE, (401, 903, 3))).save(file, form, exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("orientation, original", [(1, [401, 903]), (3, [401, 903]), (6, [903, 401]), (7, [903, 401])])
@pytest.mark.parametrize("form, parts", [("JPEG", 4), ("PNG", 1), ("TIFF", 1), ("WEBP", 1)])
def test_the_original_size_is_that_of_the_upright_file(form, parts, orientation, original):
    """Also where a JPEG is decoded at a quarter of its size."""
    record = picture(encoded(form, orientation), side=50)
    assert record["original"].tolist() == original
    assert record["image"].shape[:2] == tuple(-(-side // parts) for side in original)
    cropped = crop(50, 50)(record, np.random.default_rng(0))
    assert cropped["sizes"][:2].tolist() == original and "original" not in cropped
