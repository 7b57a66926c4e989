"""TFDS data sets that are not ours: built here, read without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data.shards import shards
from diffusion_jax.data.sources import _caption, _class_names, _from_builder, _prepare


class Captioned(tfds.core.GeneratorBasedBuilder):
    """Two pictures with several captions each, and one without any, laid out as `coco_captions` is."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        captions = tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": tfds.features.Image(), "captions": captions})
        )

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, name in enumerate(("black", "white", "grey")):
            captions = [{"id": 2 * i, "text": f"a {name} square"}, {"id": 2 * i + 1, "text": f"{name}"}]
            captions = [] if name == "grey" else captions
            yield i, {"image": Image.new("RGB", (9, 7), name), "captions": captions}


def test_all_of_several_captions_are_used(tmp_path):
    builder = Captioned(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = _from_builder(builder, "train")
    assert sorted(source.captions) == [("",), ("a black square", "black"), ("a white square", "white")]
    for record in source:
        assert record["image"].shape == (7, 9, 3)
        assert (record["image"] == 0).all() == (record["caption"] == "a black square")
    assert source.measure(0).tolist() == [7, 9]


def test_numbers_are_no_names_of_classes():
    assert _class_names(tfds.features.ClassLabel(num_classes=3)) == ()
    assert _class_names(tfds.features.ClassLabel(names=["0", "1", "2"])) == ()
    assert _class_names(tfds.features.ClassLabel(names=["b", "a"])) == ["b", "a"]


def test_a_list_of_texts_is_several_captions():
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "texts": tfds.features.Sequence(tfds.features.Text())}
    )
    assert _caption(features)({"texts": [b"one", "zwölf".encode()]}) == ("one", "zwölf")


def test_shards_of_a_prepared_data_set_are_a_source_too(tmp_path):
    builder = Captioned(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    by_name = _from_builder(builder, "train")
    by_files = shards("array_record", f"{builder.data_path}/captioned-train.array_record*", tmp_path, 1e9)
    assert list(by_files.captions) == list(by_name.captions)
    for record, expected in zip(by_files, by_name, strict=True):
        np.testing.assert_array_equal(record["image"], expected["image"])


def test_two_processes_may_prepare_a_data_set_at_once(tmp_path):
    class Overtaken(Captioned, skip_registration=True):
        name = "captioned"

        def _generate_examples(self):
            yield from super()._generate_examples()
            Captioned(data_dir=tmp_path, file_format="array_record").download_and_prepare()

    builder = Overtaken(data_dir=tmp_path, file_format="array_record")
    _prepare(builder)
    assert len(_from_builder(builder, "train")) == 3
