"""Z-Image: whole pictures equal those of diffusers' pipeline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import published
from diffusion_jax import build
from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.families import z_image
from diffusion_jax.interop.noise_schedules import schedule_of
from diffusion_jax.interop.schedulers import published_plan
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


@pytest.fixture(scope="module")
def loaded(pipeline):
    return load_pipeline(pipeline[1])


@pytest.mark.parametrize(("shift", "steps", "theirs_g"), [(6.0, 5, 4.0), (3.0, 4, 0.0)])
def test_whole_pictures_equal_those_of_diffusers(shift, steps, theirs_g, pipeline, loaded, peer):  # noqa: F811
    """Of captions of 1 to 512 tokens in one batch; the scale g of their guidance is 1 + g of ours."""
    theirs, _ = pipeline
    assert loaded.family == z_image.FAMILY and loaded.prediction == "flow"
    theirs.scheduler = theirs.scheduler.from_config(theirs.scheduler.config, shift=shift)
    model = from_published(loaded._replace(scheduler=loaded.scheduler | {"shift": shift}), SIZE)
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
    assert expected.std() > 0.05 and np.abs(pictures - expected).max() < 1e-3  # 1 / 255 is 4e-3


def test_the_text_is_that_of_diffusers(pipeline, loaded):
    """The tokens of a prompt, without padding; captions are read like prompts; Qwen3's last layer is not read."""
    theirs, _ = pipeline
    assert "layers_2" not in loaded.text_encoders[0].params["params"]
    conditioning = from_published(loaded, SIZE).conditioning
    expected, _ = theirs.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    largest = max(np.abs(text.detach().numpy()).max() for text in expected)
    for cond in (conditioning.of_prompts(PROMPTS), conditioning.of_records({"caption": PROMPTS})):
        assert cond["text"].shape == (len(PROMPTS), 512, 8) and cond["mask"][3].all()
        for text, mask, of_theirs in zip(cond["text"], cond["mask"], expected, strict=True):
            np.testing.assert_allclose(text[mask], of_theirs.detach(), atol=1e-5 * largest)
    null = conditioning.null
    np.testing.assert_allclose(null["text"][null["mask"]], expected[2].detach(), atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("shift", "steps", "sigmas"),
    [
        (3.0, 8, [1, 0.954545, 0.9, 0.833333, 0.75, 0.642857, 0.5, 0.3]),
        (6.0, 28, [1, 0.993865, 0.987342, 0.980392]),
    ],
)
def test_published_schedulers_have_their_levels(shift, steps, sigmas):
    """At every size of images."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": False, "shift": shift}
    plan = published_plan(config | z_image.FAMILY.levels(4096, steps), schedule_of(config, "test")[0], steps)
    np.testing.assert_allclose(plan.level.sigma[: len(sigmas)], sigmas, atol=1e-6)


@pytest.mark.parametrize(
    ("shift", "index", "is_turbo"),
    [
        (3.0, {}, True),
        (6.0, {}, False),
        (3.0, {"is_distilled": False}, False),
        (6.0, {"is_distilled": True}, True),
    ],
)
def test_guidance_is_refused_where_it_is_built_in(shift, index, is_turbo, loaded):
    """0, which is no guidance in the code of its authors, too."""
    loaded = loaded._replace(scheduler=loaded.scheduler | {"shift": shift}, index={**loaded.index, **index})
    model, config = from_published(loaded, SIZE), published.get_config()
    for scale in (6.0, 0.0):
        config.sample.guidance = scale
        if is_turbo:
            with pytest.raises(ValueError, match=rf"guidance built in: set sample.guidance to 1, got {scale:g}"):
                build.sampling.plan_and_guidance(config, model)
        else:
            assert build.sampling.plan_and_guidance(config, model)[1].scale == scale


def test_what_does_not_fit_is_one_line(loaded):
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 18 and 16"):
        from_published(loaded, (18, 16))
    wider = loaded.denoiser._replace(module=loaded.denoiser.module.clone(in_channels=16))
    with pytest.raises(ValueError, match=r"expected a transformer of 3 input channels, .* got 16"):
        from_published(loaded.with_denoiser(wider))
    with pytest.raises(ValueError, match="clip_skip: Z-Image has no choice of the text encoders' layer"):
        loaded.with_clip_skip(1)
