"""What the page suggests, and where its pictures are written."""

import pytest

from configs import digits, emoji
from diffusion_jax.serve.saving import Album, file_name
from diffusion_jax.serve.suggestions import examples, vocabulary


def test_the_words_of_the_demo_are_those_that_it_was_trained_with():
    words = vocabulary(emoji.full(), ["<mine>"])
    assert {"cup", "cat", "hot dog", "<mine>"} <= set(words["names"]) and "hot beverage" not in words["names"]
    assert words["styles"] == ("outlined", "flat", "line drawing", "shaded") and "purple" in words["colours"]
    assert "on an orange background" in words["grounds"] and "on a blue background" in words["grounds"]
    simple = vocabulary(emoji.small(), [])["names"]
    assert 90 < len(simple) < len(words["names"])


def test_classes_have_numbers_and_an_unknown_data_set_has_no_words():
    assert vocabulary(digits.get_config(), [])["names"] == tuple("0123456789")
    config = emoji.full()
    config.data.source = "folder"
    assert not any(vocabulary(config, []).values())


def test_the_demo_has_eight_examples_and_other_weights_may_have_theirs(tmp_path):
    assert len(examples("weights/emoji")) == 8
    assert examples(str(tmp_path)) == examples("random") == ()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A red apple, flat!", "a-red-apple-flat-7"),
        ("../../etc/passwd", "etc-passwd-7"),
        ("Äpfel und 日本", "äpfel-und-日本-7"),
        ("", "picture-7"),
        ("x" * 100, "x" * 60 + "-7"),
    ],
)
def test_a_file_is_called_by_its_prompt_and_seed(prompt, name):
    assert file_name(prompt, "7") == name


def test_no_picture_replaces_another(tmp_path):
    album, texts = Album(str(tmp_path / "new")), {"prompt": "a cat", "seed": "3"}
    for content in b"first", b"second":
        album.add(texts, content)
    assert (tmp_path / "new" / "a-cat-3.png").read_bytes() == b"first"
    assert (tmp_path / "new" / "a-cat-3-2.png").read_bytes() == b"second"


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^config\.serve\.save: cannot write to "):
        Album(str(tmp_path / "file"))
