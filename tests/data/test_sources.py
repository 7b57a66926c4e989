"""Sources have the content of their files, and report errors in one line."""

import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, features
from pyarrow import parquet

from diffusion_jax.data import sources


def paint(path, value: int = 0, size: int = 8):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (value, 0, 0)).save(path)


def test_digits_split_without_overlap():
    train, validation = sources.digits("train"), sources.digits("validation")
    assert len(train) + len(validation) == 1797
    assert train.num_classes == 10
    assert {train[i]["label"] for i in range(100)} == set(range(10))
    assert train[0]["image"].shape == (8, 8, 3)
    assert max(train[i]["image"].max() for i in range(100)) == 255
    with pytest.raises(ValueError, match='"train" and "validation", got "test"'):
        sources.digits("test")


def test_indices_count_from_both_ends_and_stop():
    source = sources.digits()
    np.testing.assert_array_equal(source[-1]["image"], source[len(source) - 1]["image"])
    with pytest.raises(IndexError):
        source[len(source)]


def test_folder_with_metadata(tmp_path):
    paint(tmp_path / "cats" / "b.png", 5)
    paint(tmp_path / "unnamed.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cats/b.png", "text": "a cat"}\n')
    source = sources.folder(tmp_path)
    assert list(source.captions) == ["a cat"]
    assert source[0]["caption"] == "a cat"
    assert source[0]["image"][0, 0, 0] == 5


def test_large_jpegs_are_decoded_for_the_size_of_the_crops(tmp_path):
    Image.new("RGB", (400, 600), "red").save(tmp_path / "a.jpg")
    assert sources.folder(tmp_path)[0]["image"].shape == (600, 400, 3)
    assert sources.folder(tmp_path, side=50)[0]["image"].shape == (150, 100, 3)


def test_a_picture_may_have_many_captions(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "one"}\n{"file_name": "a.png", "text": "two"}\n'
    )
    source = sources.folder(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["one", "two"]


def test_folder_with_text_files(tmp_path):
    for i, name in enumerate("ab"):
        paint(tmp_path / f"{name}.png", i)
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    source = sources.folder(tmp_path)
    assert [source[i]["caption"] for i in range(2)] == ["picture a", "picture b"] == list(source.captions)


@pytest.mark.parametrize("names", [("1.TXT", "2.txt"), ("1.caption", "2.Caption"), ("1.txt", "1.caption", "2.caption")])
def test_captions_have_the_names_that_programs_give_them(tmp_path, names):
    for number in (1, 2):
        paint(tmp_path / f"{number}.png", number)
    for name in names:
        (tmp_path / name).write_text(f"of {name}")
    expected = [f"of {name}" for name in names if name != "1.caption" or "1.txt" not in names]
    assert list(sources.folder(tmp_path).captions) == expected


def test_folder_with_classes(tmp_path):
    for i, name in enumerate(["dog/1.png", "cat/2.jpg", "cat/deep/3.PNG", ".hidden/4.png"]):
        paint(tmp_path / name, i)
    source = sources.folder(tmp_path)
    assert source.num_classes == 2
    assert sorted(source[i]["label"] for i in range(len(source))) == [0, 0, 1]
    assert not source.captions


def test_folder_of_pictures_alone(tmp_path):
    paint(tmp_path / "a.png")
    source = sources.folder(tmp_path)
    assert source[0].keys() == {"image", "original"}
    assert source.num_classes == 0


def test_a_folders_name_follows_its_content(tmp_path):
    paint(tmp_path / "a.png")
    before = sources.folder(tmp_path).name
    assert sources.folder(tmp_path).name == before
    (tmp_path / "a.txt").write_text("an a")
    captioned = sources.folder(tmp_path).name
    paint(tmp_path / "a.png", size=16)
    assert len({before, captioned, sources.folder(tmp_path).name}) == 3


def test_no_folder_and_no_pictures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        sources.folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no pictures"):
        sources.folder(tmp_path)


def test_missing_pictures_and_captions_are_named(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("an a")
    with pytest.raises(FileNotFoundError, match=r"none for 1 of its pictures: b\.png$"):
        sources.folder(tmp_path)
    lines = [{"file_name": f"{name}.png", "text": name} for name in "avwxyz"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(FileNotFoundError, match=r"missing \(5\): v\.png, w\.png, x\.png, \.\.\.$"):
        sources.folder(tmp_path)


TEXT = '{"file_name": "a.png", "text": %s}'


@pytest.mark.parametrize(
    "line",
    [
        '{"file_name": "a.png"}',
        "a.png a",
        "[1]",
        *(TEXT % text for text in ("null", "7", "[]", '["a", null]', "{}")),
    ],
)
def test_bad_lines_of_metadata_are_named(tmp_path, line):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2: expected .*file_name.*, got "):
        sources.folder(tmp_path)


def test_empty_lines_say_nothing(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n" + TEXT % '"a"' + "\n \n\n")
    assert list(sources.folder(tmp_path).captions) == ["a"]


@pytest.mark.parametrize("row", ["a.png", "a.png,a cat, sitting"])
def test_bad_rows_of_metadata_are_named(tmp_path, row):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\na.png,a\n{row}\n")
    with pytest.raises(ValueError, match=r"metadata\.csv row 2: expected the columns file_name and text, got "):
        sources.folder(tmp_path)
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a cat\n')
    with pytest.raises(ValueError, match=r"metadata\.csv: expected CSV, got an error: unexpected end of data"):
        sources.folder(tmp_path)


@pytest.mark.parametrize("character", "\u2028\u2029\x85")
def test_only_a_newline_ends_a_line(tmp_path, character):
    paint(tmp_path / "a.png")
    caption = f"one{character}two"
    line = json.dumps({"file_name": "a.png", "text": caption}, ensure_ascii=False)
    for end in ("", "\n", "\r\n"):
        (tmp_path / "metadata.jsonl").write_bytes((line + end).encode())
        assert sources.folder(tmp_path).captions == [caption]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat", encoding="utf-8-sig")
    assert sources.folder(tmp_path).captions == ["a cat"]
    (tmp_path / "metadata.csv").write_text("file_name,text\r\na.png,a dog\r\n", encoding="utf-8-sig")
    assert sources.folder(tmp_path).captions == ["a dog"]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text(TEXT % '"a bird"', encoding="utf-8-sig")
    assert sources.folder(tmp_path).captions == ["a bird"]


def test_a_list_of_texts_is_several_captions(tmp_path):
    for name in "abc":
        paint(tmp_path / f"{name}.png")
    lines = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": ["two", "three"]}]
    lines.append({"file_name": "c.png", "text": ["four"]})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = sources.folder(tmp_path)
    assert source.captions == [("one",), ("two", "three"), ("four",)]
    assert source[1]["caption"] == "two"
    assert sources.with_captions(source)[1]["caption"] == ("two", "three")


def test_metadata_may_be_in_a_folder_below_and_of_either_form(tmp_path):
    paint(tmp_path / "train" / "deep" / "a.png", 5)
    paint(tmp_path / "test" / "b.png", 6)
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "deep/a.png", "text": "a"}')
    (tmp_path / "test" / "metadata.csv").write_text('text,file_name\n"b, ""quoted""",b.png\n')
    source = sources.folder(tmp_path)
    assert {source[i]["caption"]: int(source[i]["image"][0, 0, 0]) for i in range(2)} == {"a": 5, 'b, "quoted"': 6}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "test/b.png", "text": "b"}')
    with pytest.raises(ValueError, match=r"b\.png: metadata\.jsonl and test/metadata\.csv name it"):
        sources.folder(tmp_path)


def test_metadata_may_be_parquet(tmp_path):
    paint(tmp_path / "train" / "a.png", 5)
    paint(tmp_path / "train" / "b.png", 6)
    file = tmp_path / "train" / "metadata.parquet"
    columns = {"file_name": ["a.png", "b.png"], "image": [b"x", b"y"]}
    parquet.write_table(pa.table(columns | {"text": ["an a", "a b"]}), file)
    source = sources.folder(tmp_path)
    assert {source[i]["caption"]: int(source[i]["image"][0, 0, 0]) for i in range(2)} == {"an a": 5, "a b": 6}
    parquet.write_table(pa.table(columns | {"text": [["one", "two"], ["three"]]}), file)
    assert sources.folder(tmp_path).captions == [("one", "two"), ("three",)]
    for wrong, row in (columns | {"text": ["an a", None]}, 2), (columns | {"txt": ["an a", "a b"]}, 1), ({"x": [1]}, 1):
        parquet.write_table(pa.table(wrong), file)
        with pytest.raises(ValueError, match=rf"parquet row {row}: expected the columns file_name and text, got "):
            sources.folder(tmp_path)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"metadata\.parquet: expected Parquet, got an error: "):
        sources.folder(tmp_path)


def test_a_caption_may_be_long(tmp_path):
    """The csv module of Python stops at 128 KiB."""
    paint(tmp_path / "a.png")
    caption = "a cat, " * 60_000
    (tmp_path / "metadata.csv").write_text(f'file_name,text\na.png,"{caption}"\n')
    assert sources.folder(tmp_path).captions == [caption]


FORMS = {
    "a.JPG": "JPEG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.avif": "AVIF", "e.jp2": "JPEG2000", "f.tga": "TGA",
    "g.ppm": "PPM", "h.bmp": "BMP", "i.TIFF": "TIFF", "j.apng": "PNG",
}  # fmt: skip


def test_every_picture_that_pillow_reads_is_used_and_other_files_are_counted(tmp_path, caplog):
    def said():
        lines, _ = [record.getMessage() for record in caplog.records], caplog.clear()
        return [line.removeprefix(f"{tmp_path}: ") for line in lines]

    known = [name for name, form in FORMS.items() if form != "AVIF" or features.check("avif")]
    for name in known:
        Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / name, FORMS[name])
    source = sources.folder(tmp_path)
    assert [file.rpartition("/")[2] for file in source.files] == known and not said()
    assert all(abs(int(source[i]["image"][0, 0, 0]) - 200) < 4 for i in range(len(source)))
    for name in ("1.heic", "2.HEIC", "train.parquet", "LICENSE", ".hidden"):
        (tmp_path / name).touch()
    assert len(sources.folder(tmp_path)) == len(known)
    others = "2 .heic, 1 without a suffix, 1 .parquet"
    assert said() == [f"left out 4 files, as they are no pictures of a known form: {others}"]
    for name in known:
        (tmp_path / name).with_suffix(".txt").write_text("red")
    assert sources.folder(tmp_path)[0]["caption"] == "red" and len(said()) == 1
    (tmp_path / "metadata.jsonl").write_text(TEXT.replace("a.png", "a.JPG") % '"a"')
    assert len(sources.folder(tmp_path)) == 1
    (line,) = said()
    assert line.startswith("left out ") and "as no metadata name them" in line and "1 .jfif" in line


def test_links_to_folders_are_followed_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    paint(root / "cat" / "1.png")
    paint(other / "2.png")
    (root / "dog").symlink_to(other)
    (root / "cat" / "up").symlink_to(root)
    (other / "cat").symlink_to(root / "cat")
    (root / "cat" / "dog").symlink_to(other)
    source = sources.folder(root)
    names = [file.removeprefix(f"{root}/") for file in source.files]
    assert names == ["cat/1.png", "dog/2.png"] and source.num_classes == 2
    for a in range(9):  # as many paths as permutations
        (root / f"{a}").mkdir()
        for b in range(9):
            (root / f"{a}" / f"{b}").symlink_to(root / f"{b}")
    assert len(sources.folder(root).files) == 2
    (root / "cat" / "lost.png").symlink_to(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"lost\.png is a link to what is not there; mend or remove it"):
        sources.folder(root)


def test_empty_metadata(tmp_path):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        sources.folder(tmp_path)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="nothing is empty"):
        sources.Source("nothing", 0, lambda i: {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar11", "no data set.*did you mean .*cifar10"),
        ("zzzzzz", "no data set.*catalog"),
        ("cifar10:9.9.9", "cannot be loaded at version"),
        ("not a name", "Parsing builder name"),
    ],
)
def test_unknown_tfds_names_get_one_line(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as error:
        sources.tfds_source(name, "train", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("train", "val"), ("train",), ("Test",)])
def test_folders_that_are_splits_are_no_classes(names, tmp_path):
    for name in names:
        paint(tmp_path / name / "cats" / "1.png")
    with pytest.raises(ValueError, match=rf"has the folders {', '.join(names)}, which are splits .* as .*/{names[0]}$"):
        sources.folder(tmp_path)
    assert sources.folder(tmp_path / names[0]).num_classes == 1


def test_half_of_a_surrogate_pair_is_no_caption(tmp_path):
    """As JavaScript writes an emoji that was cut."""
    paint(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat \\ud83d"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 1: expected "):
        sources.folder(tmp_path)
