"""Sources have the content of their files, and report errors in one line."""

import json

import numpy as np
import pytest
from PIL import Image

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
    assert source[0].keys() == {"image"}
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


@pytest.mark.parametrize("line", ['{"file_name": "a.png"}', "a.png a", "[1]", ""])
def test_bad_lines_of_metadata_are_named(tmp_path, line):
    paint(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"metadata\.jsonl line 2: expected .*file_name.*, got "):
        sources.folder(tmp_path)


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
