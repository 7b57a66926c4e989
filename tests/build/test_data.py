"""The source that a config names."""

import pytest

from configs import digits
from diffusion_jax import build, paths
from tests.data import odd


def data(source: str, cache: str = ""):
    config = digits.get_config()
    config.data.source, config.data.cache = source, cache
    return config


def test_a_split_may_stand_in_the_name_of_shards(tmp_path):
    for name, level in (("train", 1), ("validation", 2)):
        for shard in range(2):
            odd.write_tar(tmp_path / f"{name}-{shard}.tar", [(f"{shard}.png", odd.solid(level))])
    config = data(f"tar:{tmp_path}/{{split}}-*.tar", str(tmp_path / "cache"))
    for split, level in (("train", 1), ("validation", 2)):
        source = build.data.source(config, split, 8)
        assert len(source) == 2 and source[0]["image"].max() == level
    assert (tmp_path / "cache" / "index").is_dir()


def test_lists_of_data_are_beside_the_cache_or_in_a_folder_for_all_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path / "home")
    odd.write_tar(tmp_path / "0.tar", [("0.png", odd.solid(1))])
    build.data.source(data(f"tar:{tmp_path}/*.tar"), "train", 8)
    assert list((tmp_path / "home" / "data" / "index").iterdir())
    with pytest.raises(ValueError, match=r"^config.data.cache: expected a local path, got gs://b/c"):
        build.data.source(data("digits", "gs://b/c"), "train", 8)


def test_several_sizes_need_pictures_in_files():
    config = data("mix:1*digits + 1*digits")
    config.data.buckets = 1
    model = build.model.diffusion_model(config)
    source = build.data.source(config, "train", 8)
    with pytest.raises(ValueError, match=r"^config.data.buckets needs the sizes of pictures in files, .*mix"):
        build.data.by_size(config, source, model)
