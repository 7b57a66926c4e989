"""The first stage trains on its own split, and on mirrored images if configured; no other stage does."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, latent_cfg
from diffusion_jax import build
from diffusion_jax import codec as codecs
from diffusion_jax.app import first_stage
from diffusion_jax.data.sources import Source
from diffusion_jax.interop import save_autoencoder
from diffusion_jax.models.autoencoder import AutoencoderKL, fold


@pytest.fixture
def config():
    config = digits.get_config()
    config.autoencoder = latent_cfg.get_config().autoencoder
    config.autoencoder.checkpoint = ""
    config.autoencoder.model.update(block_out_channels=(4, 8), norm_num_groups=1)
    config.autoencoder.loss.perceptual = 0.0
    config.autoencoder.train.batch_size = 64
    return config


def images_trained_on(config, tmp_path) -> np.ndarray:
    task = first_stage.task(config, tmp_path)
    return np.concatenate([batch["image"] for batch in itertools.islice(task.batches(0), 4)])


def test_it_starts_from_the_weights_that_the_config_names(config, tmp_path):
    config.seed = 1
    model, params = build.model.autoencoder(config), first_stage.task(config, tmp_path).params["autoencoder"]
    save_autoencoder(model, params, tmp_path / "vae")
    config.seed = 2
    other = first_stage.task(config, tmp_path).params["autoencoder"]
    config.autoencoder.init = str(tmp_path / "vae")
    jax.tree.map(np.testing.assert_array_equal, first_stage.task(config, tmp_path).params["autoencoder"], params)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), other, params)))
    config.autoencoder.model.block_out_channels = (4, 16)
    with pytest.raises(ValueError, match=r"vae has the weights of another network: .* expected"):
        first_stage.task(config, tmp_path)


def test_a_first_stage_whose_weights_were_not_written_is_still_missing(config, tmp_path, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    folder = build.weights.first_stage_folder(tmp_path)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr("diffusion_jax.interop.folders.write_file", killed)
        save_autoencoder(AutoencoderKL(), {}, folder)
    assert first_stage.is_missing(config, tmp_path)
    save_autoencoder(AutoencoderKL(), {}, folder)
    assert not first_stage.is_missing(config, tmp_path)


def members(images, source) -> np.ndarray:
    records = {source[i]["image"].tobytes() for i in range(len(source))}
    return np.array([image.tobytes() in records for image in images])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_it_learns_from_the_split_that_the_config_names(split, config, tmp_path):
    config.autoencoder.flip, config.data.splits.first_stage = False, split
    images = images_trained_on(config, tmp_path)
    assert members(images, build.data.source(config, split, 8)).all()


def test_the_scale_of_latents_is_estimated_on_images_drawn_by_the_seed(config, monkeypatch):
    """A source may be sorted, here dark before bright: its first images tell nothing of the others."""
    monkeypatch.setattr(first_stage, "SCALE_IMAGES", 64)
    images = [np.full((8, 8, 3), shade, np.uint8) for shade in [0] * 500 + [255] * 500]
    source = Source("sorted", 1000, lambda i: {"image": images[i]})

    def moments(self, variables, x, method):
        return jnp.concatenate([x, jnp.zeros_like(x)], axis=-1)

    monkeypatch.setattr(AutoencoderKL, "apply", moments)  # the latent is the image

    def scale(seed):
        latents = first_stage._latents(AutoencoderKL(), {}, source, lambda record, rng: record, seed)
        return first_stage.normalized(AutoencoderKL(), {}, latents)[0].scaling_factor

    assert abs(scale(0) - 1) < 0.1 and scale(0) == scale(0) != scale(1)


def test_the_cells_of_patches_have_mean_0_and_variance_1_in_every_channel():
    rng = np.random.default_rng(0)
    latents = rng.normal(3, 2, size=(16, 4, 6, 2)).astype(np.float32) * [1, 0.1]
    model = AutoencoderKL(latent_channels=2, patch_size=(2, 2))
    model, variables = first_stage.normalized(model, {"params": {}}, latents.astype(np.float32))
    codec = codecs.autoencoder_kl(model, variables)
    x0 = codec.sample(codec.stats, fold(jnp.asarray(latents, jnp.float32), (2, 2)), None)
    np.testing.assert_allclose(x0.mean(axis=(0, 1, 2)), np.zeros(8), atol=1e-4)
    np.testing.assert_allclose(x0.var(axis=(0, 1, 2)), np.ones(8), rtol=5e-3)  # 1e-4 is added to 0.04


def test_half_of_its_images_are_mirrored_and_no_others(config, tmp_path):
    config.autoencoder.flip = True
    images = images_trained_on(config, tmp_path)
    source = build.data.source(config, "train", 8)
    as_they_are, mirrored = members(images, source), members(images[:, :, ::-1], source)
    assert (as_they_are | mirrored).all()
    assert 0.3 < as_they_are.mean() < 0.7
    record = build.data.transform(config, (8, 8))(source[0], np.random.default_rng(0))
    np.testing.assert_array_equal(record["image"], source[0]["image"])


def test_a_flip_asked_of_the_transform_is_added_to_that_of_the_data(config):
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

    def mirrored(**flip) -> int:
        transform, rng = build.data.transform(config, (8, 8), **flip), np.random.default_rng(0)
        return sum(not np.array_equal(transform({"image": image}, rng)["image"], image) for _ in range(100))

    assert mirrored() == 0 and 30 < mirrored(flip=True) < 70
    config.data.flip = True
    assert 30 < mirrored() < 70
