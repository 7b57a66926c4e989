"""Z-Image: whole pictures equal those of diffusers' pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.families import z_image
from diffusion_jax.pipelines import from_noise
from diffusion_jax.pipelines.published import from_published
from tests.interop.flow_pipelines import SIZE, z_image_pipeline
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)

PROMPTS = ["a", "the quick (brown) fox's <|endoftext|> don't\n" * 5, "", " 日本語 12 345 " * 100]


@pytest.fixture(scope="module")
def pipeline(peer, byte_pairs, tmp_path_factory):  # noqa: F811
    """diffusers' pipeline, and its folder."""
    folder = tmp_path_factory.mktemp("z_image")
    return z_image_pipeline(peer, byte_pairs, folder), folder / "pipeline"


@pytest.mark.parametrize(("shift", "steps", "theirs_g"), [(6.0, 5, 4.0), (3.0, 4, 0.0)])
def test_whole_pictures_equal_those_of_diffusers(shift, steps, theirs_g, pipeline, peer):  # noqa: F811
    """Of captions of 1 to 512 tokens in one batch; the scale g of their guidance is 1 + g of ours."""
    theirs, folder = pipeline
    published = load_pipeline(folder)
    assert published.family == z_image.FAMILY and published.prediction == "flow"
    theirs.scheduler = theirs.scheduler.from_config(theirs.scheduler.config, shift=shift)
    published = published._replace(scheduler=published.scheduler | {"shift": shift})
    model = from_published(published, SIZE)
    assert model.has_guidance == (shift == 3.0) and model.shape == (8, 12, 3)
    noise = np.random.default_rng(0).normal(size=(len(PROMPTS), *model.shape)).astype(np.float32)
    expected = theirs(
        prompt=list(PROMPTS),
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=steps,
        guidance_scale=theirs_g,
        latents=peer.tensor(noise),
        output_type="np",
    ).images
    plan = model.published_solvers["published"](steps, size=model.size)
    np.testing.assert_allclose(theirs.scheduler.sigmas[:-1], plan.level.sigma, rtol=1e-6)
    cond, keys = model.conditioning.of_prompts(PROMPTS), jax.random.split(jax.random.key(0), len(PROMPTS))
    pictures = np.clip(from_noise(model, jnp.asarray(noise), cond, keys, plan, 1 + theirs_g) / 2 + 0.5, 0, 1)
    assert expected.std() > 0.05 and np.abs(pictures - expected).max() < 1e-3
