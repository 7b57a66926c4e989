"""Any picture becomes the right square, or a bad record that says why."""

import io
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms
from PIL.PngImagePlugin import PngImageFile, PngInfo
from sklearn.datasets import load_sample_images

from diffusion_jax.data.crops import centred_mask, variants
from diffusion_jax.data.crops import crop as crop_to
from diffusion_jax.data.transforms import (
    SRGB,
    BadRecord,
    decode,
    decode_alpha,
    decode_mask,
    decode_texts,
    picture,
    to_float,
    to_uint8,
)


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


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0])


@pytest.mark.parametrize("shape", [(375, 500), (427, 640), (700, 300)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_a_crop_is_that_part_of_the_whole_picture_resized(photograph, shape, random_crop):
    image = np.asarray(photograph.resize(shape[::-1]))
    scale = max(256 / side for side in shape)
    height, width = (round(scale * side) for side in shape)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    top, left = (height - 256) // 2, (width - 256) // 2
    if random_crop:
        top, left = np.random.default_rng(0).integers(0, np.array([height, width]) - 256 + 1)
    result = crop_to(256, 256, random_crop=random_crop)({"image": image}, np.random.default_rng(0))["image"]
    difference = np.abs(result.astype(int) - whole[top : top + 256, left : left + 256])
    assert difference.max() <= 1 and np.mean(difference > 0) < 0.01


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=92, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size, scale", [((2000, 1400), 4), ((1100, 700), 2), ((700, 1100), 2), ((700, 399), 1)])
def test_a_large_jpeg_is_decoded_in_part_and_its_crop_stays(photograph, form, size, scale):
    data = jpeg(photograph.resize(size, Image.Resampling.LANCZOS).convert(form))
    whole, part = decode(data), picture(data, side=100)["image"]
    assert part.shape[:2] == tuple(-(-side // scale) for side in whole.shape[:2])
    crops = [crop_to(100, 100)({"image": image}, np.random.default_rng(0))["image"] for image in (whole, part)]
    difference = np.abs(crops[0].astype(int) - crops[1])
    assert difference.mean() < 0.7 and difference.max() <= 8


def test_a_turned_jpeg_is_decoded_in_part(photograph):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = jpeg(photograph.resize((900, 600)), exif=exif)
    assert picture(data, side=100)["image"].shape == (450, 300, 3)


def test_other_pictures_are_decoded_whole(photograph):
    data = encode(photograph)
    np.testing.assert_array_equal(picture(data, side=16)["image"], np.asarray(photograph))


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


def raw_png(kind: int, depth: int, row: bytes, width: int, transparent: bytes) -> bytes:
    """A PNG of one row, by its specification. kind: 0 grey, 2 RGB. transparent: the content of tRNS."""
    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    chunks = {b"IHDR": header, b"tRNS": transparent, b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    checked = ((name + content, len(content)) for name, content in chunks.items())
    body = (struct.pack(">I", n) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, n in checked)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("transparent", [0, 1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_has_the_depth_of_its_pixels(depth, transparent):
    most = 2**depth - 1
    transparent = min(transparent * (most // 3 or 1), most)
    levels = [0, most // 3, 2 * most // 3, most]
    bits = sum(level << (depth * (3 - i)) for i, level in enumerate(levels))
    row = (bits << (-4 * depth % 8)).to_bytes(-(-4 * depth // 8), "big")
    png = raw_png(0, depth, row, 4, struct.pack(">H", transparent))
    np.testing.assert_array_equal(decode_alpha(png)[0], [0 if level == transparent else 255 for level in levels])
    expected = [255 if level == transparent else level * 255 // most for level in levels]
    np.testing.assert_array_equal(decode(png)[0, :, 0], expected)


@pytest.mark.parametrize("depth", [8, 16])
def test_the_transparent_colour_of_a_png_has_the_depth_of_its_pixels(depth):
    colours = np.array([[200, 3, 90], [7, 120, 33]]) << (depth - 8) | (depth - 8) * 5
    row, colour = colours.astype(f">u{depth // 8}").tobytes(), colours[1].astype(">u2").tobytes()
    png = raw_png(2, depth, row, 2, colour)
    np.testing.assert_array_equal(decode(png), [[[200, 3, 90], [255, 255, 255]]])


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


def of_form(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def with_chunk(png: bytes, name: bytes, content: bytes, checksum: bytes | None = None) -> bytes:
    """The PNG with one more chunk after its header."""
    checksum = zlib.crc32(name + content).to_bytes(4, "big") if checksum is None else checksum
    return png[:33] + len(content).to_bytes(4, "big") + name + content + checksum + png[33:]


def test_tags_that_nobody_reads_do_not_decide_about_a_jpeg():
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    tags[ExifTags.Base.XResolution] = 72.0
    rational, text = b"\x01\x1a\0\5", b"\x01\x1a\0\2"
    assert rational in tags.tobytes()
    for exif in (tags.tobytes(), tags.tobytes().replace(rational, text)):
        assert decode(of_form(Image.new("RGB", (16, 8)), "JPEG", exif=exif)).shape == (16, 8, 3)
    assert decode(of_form(Image.new("RGB", (16, 8)), "JPEG", exif=b"Exif\0\0 no tags")).shape == (8, 16, 3)


def test_damaged_or_large_metadata_does_not_decide_about_a_png():
    colours = coordinates(4, 6)
    png = encode(Image.fromarray(colours))
    compressed = zlib.compress(b"x" * (2 << 20))
    for name, content, checksum in [
        (b"zTXt", b"Comment\0\0" + compressed, None),
        (b"iTXt", b"Comment\0\1\0\0\0" + compressed, None),
        (b"tEXt", b"Comment\0x", b"bad!"),
        (b"eXIf", b"no tags", None),
        (b"eXIf", b"MM\0*", b"bad!"),
        (b"iCCP", b"name\0\0damaged", None),
        (b"pHYs", b"\0", None),
        (b"sRGB", b"", None),
    ]:
        np.testing.assert_array_equal(decode(with_chunk(png, name, content, checksum)), colours)
    turned = b"XML:com.adobe.xmp\0\0\0\0\0<tiff:Orientation>6</tiff:Orientation>"
    assert decode(with_chunk(png, b"iTXt", turned)).shape == (6, 4, 3)
    with pytest.raises(BadRecord):
        decode(png[:33] + b"\xff" * 8 + png[33:])


def test_a_large_profile_or_text_of_orientation_is_read():
    """PIL stops at 1 MiB, which profiles of printers exceed."""
    exchanged = matrix_profile(*SRGB_IN_D50.T[[1, 2, 0]], gamma=1.0)
    large = exchanged + bytes(3 << 20)
    large = len(large).to_bytes(4, "big") + large[4:]
    image = Image.new("RGB", (4, 4), (40, 120, 200))
    small, big = (decode(encode(image, icc_profile=profile)) for profile in (exchanged, large))
    np.testing.assert_array_equal(big, small)
    png = encode(Image.fromarray(coordinates(4, 6)))
    turned = b"<tiff:Orientation>6</tiff:Orientation>" + b" " * (3 << 20)
    assert decode(with_chunk(png, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned)).shape == (6, 4, 3)
    compressed = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(turned)
    assert decode(with_chunk(png, b"iTXt", compressed)).shape == (6, 4, 3)


def test_texts_are_read_with_one_decoding(monkeypatch):
    loads, load = [], PngImageFile.load

    def counted(self):
        loads.append(self)
        return load(self)

    monkeypatch.setattr(PngImageFile, "load", counted)
    info = PngInfo()
    info.add_itxt("prompt", "a kitty")
    assert decode_texts(encode(Image.new("RGB", (4, 4)), pnginfo=info)) == {"prompt": "a kitty"}
    assert len(loads) == 1 and decode_texts(of_form(Image.new("RGB", (4, 4)), "JPEG")).keys() <= {"comment"}
    for wrong, reason in (b"none", "known format"), (encode(Image.new("1", (4000, 2))), "32 to 1"):
        with pytest.raises(BadRecord, match=reason):
            decode_texts(wrong)
    damaged = with_chunk(encode(Image.new("RGB", (4, 4)), pnginfo=info), b"tEXt", b"a\0b", b"bad!")
    assert decode_texts(damaged) == {"prompt": "a kitty"}


def test_whatever_a_decoder_raises_is_a_bad_record(monkeypatch):
    png = encode(Image.new("RGB", (4, 4)))
    for error in (TypeError("a"), KeyError(), ZeroDivisionError(), OverflowError("b\nc"), MemoryError()):

        def fails(*_, raised=error):
            raise raised

        monkeypatch.setattr(PngImageFile, "load", fails)
        with pytest.raises(BadRecord, match="not a readable picture"):
            decode(png)


def test_floats_are_black_at_0_and_white_at_1():
    levels = np.array([[0, 51, 102, 255]], np.uint8)
    tiff = of_form(Image.fromarray(levels.astype(np.float32) / 255), "TIFF")
    np.testing.assert_array_equal(decode(tiff)[..., 0], levels)
    rounded = np.array([[-1e-4, 1.0000001]], np.float32)  # as a resize leaves them
    np.testing.assert_array_equal(decode(of_form(Image.fromarray(rounded), "TIFF"))[0, :, 0], [0, 255])
    for bad in (np.nan, np.inf, 1.5, -0.1):
        with pytest.raises(BadRecord, match=r"grey levels from .*, expected 0 to 1"):
            decode(of_form(Image.fromarray(np.full((2, 2), bad, np.float32)), "TIFF"))
    with pytest.raises(BadRecord, match="grey levels from 0 to 70000, expected 0 to 65535"):
        decode(of_form(Image.fromarray(np.array([[0, 70000]], np.int32)), "TIFF"))


def tiff_of_grey(data: bytes, width: int, bits: int, white_is_zero: bool = False, sample_format: int = 1) -> bytes:
    """One row of grey levels as a TIFF, by the tags of TIFF 6.0, section 3 to 8."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 273: 8, 277: 1, 278: 1}
    tags |= {279: len(data), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    start = 8 + len(data) + len(data) % 2
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, start) + data.ljust(start - 8, b"\0") + directory


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_grey_of_any_depth_goes_from_black_to_white(white_is_zero):
    """TIFF 6.0, section 4: BlackIsZero maps 0 to black and 2^bits - 1 to white, WhiteIsZero the other way round."""
    levels = np.array([0, 0x12, 0x80, 0xFF])
    packed_12_bits = bytes.fromhex("00012f800fff")
    forms = [(8, levels.astype("<u1")), (16, (levels * 257).astype("<u2"))]
    for bits, data in (
        forms if white_is_zero else [*forms, (12, packed_12_bits)]
    ):  # which Pillow reads in this form alone
        grey = decode(tiff_of_grey(bytes(data), 4, bits, white_is_zero))[0, :, 0]
        np.testing.assert_array_equal(grey, 255 - levels if white_is_zero else levels)
    floats = tiff_of_grey((levels / 255).astype("<f4").tobytes(), 4, 32, white_is_zero, sample_format=3)
    np.testing.assert_array_equal(decode(floats)[0, :, 0], 255 - levels if white_is_zero else levels)
    np.testing.assert_array_equal(decode_mask(floats)[0], 255 - levels if white_is_zero else levels)


@pytest.mark.parametrize(("bits", "sample_format"), [(16, 2), (32, 1), (32, 2)])
def test_grey_whose_white_is_unknown_is_bad(bits, sample_format):
    levels = np.array([0, 40, 255]).astype(f"<i{bits // 8}").tobytes()
    with pytest.raises(BadRecord, match="grey levels from 0 to 255, expected 0 to 65535 in 8 to 16 bits: of signed"):
        decode(tiff_of_grey(levels, 3, bits, sample_format=sample_format))


def matrix_profile(red, green, blue, gamma: float) -> bytes:
    """An ICC profile of version 2 with these primaries, XYZ relative to D50, and a power law."""

    def fixed(values):
        return b"".join(round(value * 65536).to_bytes(4, "big", signed=True) for value in values)

    curve = b"curv\0\0\0\0\0\0\0\1" + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    white = (0.9642, 1.0, 0.8249)
    tags = {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, b"wtpt": white}
    tags = {name: b"XYZ \0\0\0\0" + fixed(values) for name, values in tags.items()}
    tags |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    tags |= {b"desc": b"desc" + bytes(7) + b"\2a\0" + bytes(78), b"cprt": b"text\0\0\0\0a\0\0\0"}
    table, content, start = len(tags).to_bytes(4, "big"), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += name + (start + len(content)).to_bytes(4, "big") + len(tag).to_bytes(4, "big")
        content += tag
    header = bytes(8) + b"\2\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(white) + bytes(48)
    profile = header + table + content
    return len(profile).to_bytes(4, "big") + profile[4:]


SRGB_IN_D50 = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def srgb_of(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, equation 5: linear light to 0..255."""
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055)
    return 255 * np.clip(encoded, 0, 1)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "RGBA", "P"])
def test_a_profile_is_converted_to_srgb(form):
    # the primaries of sRGB turned round, and a gamma of 1: linear light with red, green and blue exchanged
    profile = matrix_profile(*SRGB_IN_D50.T[[1, 2, 0]], gamma=1.0)
    colour = np.array([40, 120, 200], np.uint8)
    image = Image.new("RGB", (8, 8), tuple(colour.tolist()))
    if form == "RGBA":
        image = image.convert("RGBA")
    if form == "P":
        image = image.quantize(2)
    file = of_form(image, form if form in ("JPEG", "TIFF") else "PNG", icc_profile=profile)
    np.testing.assert_allclose(decode(file)[0, 0], srgb_of(colour[[2, 0, 1]] / 255), atol=3 if form == "JPEG" else 1)


def test_a_profile_of_srgb_changes_nothing_and_one_that_does_not_fit_says_nothing():
    image = coordinates(4, 6)
    profile = ImageCms.ImageCmsProfile(SRGB).tobytes()
    for unchanged in (profile, b"damaged", b"", profile[:200]):
        np.testing.assert_array_equal(decode(encode(Image.fromarray(image), icc_profile=unchanged)), image)
    grey = Image.fromarray(image[..., 0])
    np.testing.assert_array_equal(decode(encode(grey, icc_profile=profile))[..., 0], image[..., 0])


def mask_forms() -> dict[str, bytes]:
    """One mask, the left half of 8 x 6, as programs write it."""
    marked = np.zeros((6, 8), bool)
    marked[:, :4] = True
    grey = Image.fromarray(marked * np.uint8(255))
    black, white = (Image.new("L", grey.size, level) for level in (0, 255))
    palette = Image.fromarray(marked.astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    labels = palette.copy()
    labels.putpalette([0, 0, 0, 128, 0, 0])  # the first colours of PASCAL VOC
    keyed = palette.copy()
    keyed.putpalette([9, 9, 9, 0, 0, 0])
    return {
        "1": encode(grey.convert("1")),
        "L": encode(grey),
        "RGB": encode(grey.convert("RGB")),
        "16 bits": encode(Image.fromarray(marked * np.uint16(65535))),
        "floats": of_form(Image.fromarray(marked.astype(np.float32)), "TIFF"),
        "CMYK": of_form(grey.convert("RGB").convert("CMYK"), "TIFF"),
        "palette": encode(palette),
        "labels": encode(Image.fromarray(marked.astype(np.uint8))),
        "labels, RGB": encode(Image.fromarray(marked.astype(np.uint8)).convert("RGB")),
        "labels, 16 bits": encode(Image.fromarray(marked.astype(np.uint16))),
        "labels, palette": encode(labels),
        "faint strokes": encode(Image.merge("LA", (black, grey.point(lambda level: level // 5)))),
        "JPEG": of_form(grey, "JPEG", quality=95),
        "opaque RGBA": encode(grey.convert("RGBA")),
        "opaque LA": encode(grey.convert("LA")),
        "black strokes": encode(Image.merge("RGBA", (black, black, black, grey))),
        "white strokes": encode(Image.merge("RGBA", (white, white, white, grey))),
        "grey strokes": encode(Image.merge("LA", (black, grey))),
        "palette, one colour transparent": encode(keyed, transparency=0),
        "WebP": of_form(Image.merge("RGBA", (black, black, black, grey)), "WEBP", lossless=True),
    }


@pytest.mark.parametrize("form", mask_forms())
def test_a_mask_marks_the_same_in_every_form(form):
    levels = decode_mask(mask_forms()[form])
    mask = centred_mask(levels, (6, 8))
    assert levels.dtype == np.uint8 and mask.shape == (6, 8, 1)
    assert mask[:, :4].all() and not mask[:, 4:].any()
    assert np.array_equal(centred_mask(255 - levels, (6, 8)), ~mask)


def test_a_mask_without_light_marks_nothing_or_is_bad():
    assert not decode_mask(encode(Image.new("L", (6, 4)))).any()
    for levels in (np.uint8([[0, 1, 2]]), np.uint16([[0, 7, 900]])):
        with pytest.raises(
            BadRecord, match=r"a mask of 3 levels from 0 to \d+, none of them light: expected black and"
        ):
            decode_mask(encode(Image.fromarray(levels)))
    soft = np.uint8([[0, 100, 200]])
    np.testing.assert_array_equal(decode_mask(encode(Image.fromarray(soft))), soft)


def test_a_mask_is_turned_as_its_picture_but_not_converted_by_a_profile():
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 6
    bright = matrix_profile(*SRGB_IN_D50.T, gamma=0.2)
    levels = decode_mask(encode(Image.new("RGB", (6, 2), (100, 100, 100)), exif=tags, icc_profile=bright))
    assert levels.shape == (6, 2) and (levels == 100).all()
