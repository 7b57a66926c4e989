"""FLUX.2's autoencoder: diffusers' loads here and agrees in patches and statistics, and ours loads in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import codec as codecs
from diffusion_jax.interop import load_autoencoder, save_autoencoder
from diffusion_jax.interop.folders import autoencoder_of
from diffusion_jax.interop.tensors import read_file, read_json, write_json
from tests.interop.test_folders import LEVELS, assert_near, peer  # noqa: F401  (a fixture)

NAME = "AutoencoderKLFlux2"
SMALL = {
    **LEVELS,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 3,
    "batch_norm_eps": 1e-2,
}
CONFIGS = {
    "whole": SMALL,
    "thinner decoder, no quantisation": SMALL
    | {"decoder_block_out_channels": (8, 16), "use_quant_conv": False, "use_post_quant_conv": False},
}


@pytest.fixture(scope="module")
def theirs(peer):  # noqa: F811
    """A function from a config to diffusers' network with statistics that are not those of a new one."""

    def make(config):
        made = peer.make(NAME, config)
        rng = np.random.default_rng(1)
        made.bn.running_mean.data = peer.tensor(rng.normal(size=12).astype(np.float32))
        made.bn.running_var.data = peer.tensor(rng.uniform(0.01, 4, size=12).astype(np.float32))
        return made

    return make


def cells_of(made, z):
    """Latents (B, C, H, W) as diffusers' pipeline gives them to the transformer."""
    from diffusers import Flux2KleinPipeline

    folded = Flux2KleinPipeline._patchify_latents(z)
    mean, variance = (value.view(1, -1, 1, 1) for value in (made.bn.running_mean, made.bn.running_var))
    return (folded - mean) / (variance + made.config.batch_norm_eps).sqrt()


def image_of(made, cells):
    """The inverse, and the decoder."""
    from diffusers import Flux2KleinPipeline

    mean, variance = (value.view(1, -1, 1, 1) for value in (made.bn.running_mean, made.bn.running_var))
    z = cells * (variance + made.config.batch_norm_eps).sqrt() + mean
    return made.decode(Flux2KleinPipeline._unpatchify_latents(z))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_agrees_with_diffusers_both_ways(config, theirs, peer, tmp_path):  # noqa: F811
    made = theirs(config)
    made.save_pretrained(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    image, cells = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((2, 12, 8, 3), (2, 3, 2, 12)))
    moments = peer.run(lambda x: made.encode(x).latent_dist.parameters, image)
    x0 = peer.run(lambda x: cells_of(made, made.encode(x).latent_dist.mode()), image)
    decoded = peer.run(lambda x: image_of(made, x), cells)

    autoencoder, variables = load_autoencoder(tmp_path / "theirs")
    assert_near(autoencoder.apply(variables, image, method="encode"), moments)
    codec = codecs.autoencoder_kl(autoencoder, variables)
    assert (codec.factor, codec.channels) == (4, 12)
    record = codec.encode(codec.params, image)
    for keys in (jax.random.split(jax.random.key(0), 2), None):  # the mode, whatever the keys are
        assert_near(codec.sample(codec.stats, record, keys), x0)
    assert_near(codec.decode(codec.params, cells), decoded)

    save_autoencoder(autoencoder, variables, tmp_path / "ours")
    back = peer.load(NAME, tmp_path / "ours")
    np.testing.assert_array_equal(peer.run(lambda x: image_of(back, x), cells), decoded)
    assert load_autoencoder(tmp_path / "ours")[0] == autoencoder


def test_an_image_comes_back_through_cells_in_tiles(theirs, tmp_path):
    theirs(SMALL).save_pretrained(tmp_path)
    whole, tiled = (codecs.autoencoder_kl(*load_autoencoder(tmp_path), tile) for tile in (0, 16))
    x0 = jax.random.normal(jax.random.key(0), (1, 10, 6, 12))
    images = [jax.jit(codec.decode)(codec.params, x0) for codec in (whole, tiled)]
    assert images[0].shape == images[1].shape == (1, 40, 24, 3)
    assert np.corrcoef(np.ravel(images[0]), np.ravel(images[1]))[0, 1] > 0.9


def test_a_codec_of_shapes_has_the_shapes_of_its_statistics(theirs, tmp_path):
    theirs(SMALL).save_pretrained(tmp_path)
    module, like = autoencoder_of(read_json(tmp_path / "config.json"), "a config")
    known = codecs.autoencoder_kl(*load_autoencoder(tmp_path)).stats
    planned = codecs.autoencoder_kl(module, like).stats
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), planned) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), known
    )


def test_a_published_config_is_taken_and_a_wrong_one_refused(theirs, tmp_path):
    theirs(SMALL).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", config | {"force_upcast": True, "scaling_factor": 0.18})
    assert load_autoencoder(tmp_path)[0].patch_size == (2, 2)
    assert "bn.num_batches_tracked" in read_file(tmp_path / "diffusion_pytorch_model.safetensors")
    for changes, message in (
        ({"patch_size": [2, 1]}, "expected square patches, got patch_size = "),
        ({"patch_size": None}, "patch_size: expected height and width of a patch, got None"),
        ({"decoder_block_out_channels": [8]}, "expected 2 levels of the decoder"),
        ({"batch_norm_eps": "small"}, "batch_norm_eps: expected a finite number, got 'small'"),
        ({"_class_name": "AutoencoderKL"}, r"(patch_size|batch_norm_eps)=.* is not supported"),
        ({"_class_name": "AutoencoderDC"}, "expected an AutoencoderKL or AutoencoderKLFlux2, got AutoencoderDC"),
    ):
        with pytest.raises(ValueError, match=f"a config: .*{message}"):
            autoencoder_of(config | changes, "a config")
