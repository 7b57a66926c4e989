"""FLUX.2 klein: whole pictures equal those of diffusers' pipeline."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import published
from diffusion_jax import build
from diffusion_jax.interop import load_pipeline, save_pipeline
from diffusion_jax.interop.families import flux2_klein
from diffusion_jax.interop.noise_schedules import schedule_of
from diffusion_jax.interop.schedulers import published_plan
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.pipelines import from_noise
from diffusion_jax.pipelines.published import from_published, published_times
from tests.interop.flow_pipelines import DYNAMIC, SIZE, klein_pipeline, theirs_drawn
from tests.interop.test_flux2_autoencoder import theirs  # noqa: F401  (a fixture)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)

PROMPTS = ["the quick (brown) fox's <|endoftext|> don't", " 日本語\n12 345 "]


@pytest.fixture(scope="module")
def klein(peer, theirs, byte_pairs, tmp_path_factory):  # noqa: F811
    """diffusers' pipeline, and its folder."""
    folder = tmp_path_factory.mktemp("klein")
    return klein_pipeline(peer, theirs, byte_pairs, folder), folder / "pipeline"


def test_whole_pictures_equal_those_of_diffusers(klein, peer):  # noqa: F811
    """Of the base model by guidance, and of the distilled one without; Qwen3's last layer is not read."""
    theirs, folder = klein  # noqa: F811
    published = load_pipeline(folder)
    assert published.family == flux2_klein.FAMILY and published.prediction == "flow"
    assert "layers_27" not in published.text_encoders[0].params["params"]
    model = from_published(published, SIZE)
    assert model.shape == (4, 6, 12)
    noise = np.random.default_rng(0).normal(size=(2, *model.shape)).astype(np.float32)
    cond, keys = model.conditioning.of_prompts(PROMPTS), jax.random.split(jax.random.key(0), 2)
    for is_distilled, steps, guidance in ((False, 5, 4.0), (True, 4, 1.0)):
        theirs.register_to_config(is_distilled=is_distilled)
        expected = theirs_drawn(theirs, PROMPTS, peer.tensor(noise), steps)
        plan = model.published_solvers["published"](steps, size=model.size)
        np.testing.assert_allclose(theirs.scheduler.sigmas[:-1], plan.level.sigma, rtol=1e-6)
        np.testing.assert_allclose(published_times(published, steps, SIZE), plan.level.sigma)
        pictures = np.clip(from_noise(model, jnp.asarray(noise), cond, keys, plan, guidance) / 2 + 0.5, 0, 1)
        assert expected.std() > 0.05 and np.abs(pictures - expected).max() < 1e-4


def test_the_text_is_that_of_diffusers(klein):
    """Padding too, which the transformer attends to; and captions are read like prompts."""
    theirs, folder = klein  # noqa: F811
    model = from_published(load_pipeline(folder), SIZE)
    expected = theirs.encode_prompt([*PROMPTS, ""])[0].detach().numpy()
    for cond in (
        model.conditioning.of_prompts([*PROMPTS, ""]),
        model.conditioning.of_records({"caption": [*PROMPTS, ""]}),
    ):
        assert cond["text"].shape == (3, 512, 24)
        assert np.abs(cond["text"] - expected).max() < 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(model.conditioning.null["text"], expected[2], atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("cells", "steps", "sigmas"),
    [
        (4096, 4, [1, 0.967384, 0.908144, 0.767200]),
        (1024, 4, [1, 0.958085, 0.883982, 0.717497]),
    ],
)
def test_published_sizes_have_their_shift(cells, steps, sigmas):
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **DYNAMIC}
    plan = published_plan(config | flux2_klein.FAMILY.levels(cells, steps), schedule_of(config, "test")[0], steps)
    np.testing.assert_allclose(plan.level.sigma, sigmas, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 50, 300])
def test_the_shift_is_that_of_diffusers(steps):
    peers = pytest.importorskip("diffusers.pipelines.flux2.pipeline_flux2_klein")
    for cells in (16, 1024, 4096, 4301, 16384):
        assert flux2_klein.FAMILY.levels(cells, steps)["mu"] == pytest.approx(peers.compute_empirical_mu(cells, steps))


def test_another_size_has_another_shift(klein):
    model = from_published(load_pipeline(klein[1]), SIZE)
    plans = [model.published_solvers["published"](4, 1.0, size) for size in (SIZE, (64, 64))]
    assert plans[1].level.sigma[1] > plans[0].level.sigma[1]
    assert not model.conditioning.words, "<think> is no learned word"
    with pytest.raises(ValueError, match="multiples of 4 pixels, got 18 and 16"):
        model.resized((18, 16))


@pytest.mark.parametrize("cells", [24, 4096])
def test_heun_has_the_shift_of_the_size_too(cells):
    def levels(name):
        config = {"_class_name": f"FlowMatch{name}DiscreteScheduler", **DYNAMIC} | flux2_klein.FAMILY.levels(cells, 4)
        return np.unique(published_plan(config, schedule_of(config, "test")[0], 4).level.sigma)

    np.testing.assert_allclose(levels("Heun"), levels("Euler"))


@pytest.mark.parametrize("is_distilled", [False, True])
def test_guidance_is_refused_where_it_is_built_in(is_distilled, klein, tmp_path):
    folder = shutil.copytree(klein[1], tmp_path / "klein")
    write_json(folder / "model_index.json", read_json(folder / "model_index.json") | {"is_distilled": is_distilled})
    config = published.get_config()
    model = from_published(load_pipeline(folder), SIZE)
    if not is_distilled:
        assert build.sampling.plan_and_guidance(config, model)[1].scale == config.sample.guidance
        return
    with pytest.raises(ValueError, match=r"guidance built in: set sample.guidance to 1, got 7\.5"):
        build.sampling.plan_and_guidance(config, model)
    config.sample.guidance = 1.0
    assert build.sampling.plan_and_guidance(config, model)[1].scale == 1


def test_what_is_missing_or_does_not_fit_is_one_line(klein, tmp_path):
    folder = shutil.copytree(klein[1], tmp_path / "klein")
    published = load_pipeline(folder)
    with pytest.raises(ValueError, match="loads only a part of its text_encoder: give the folder") as error:
        save_pipeline(published, tmp_path / "saved")
    assert "\n" not in str(error.value)
    wider = published.denoiser._replace(module=published.denoiser.module.clone(in_channels=16))
    with pytest.raises(ValueError, match=r"a transformer of 12 input and output channels, .* got 16 and 16"):
        from_published(published.with_denoiser(wider))
    config = read_json(folder / "text_encoder" / "config.json")
    write_json(folder / "text_encoder" / "config.json", config | {"num_hidden_layers": 20, "layer_types": None})
    with pytest.raises(ValueError, match=r"text_encoder/config.json: expected Qwen3 with at least 27 layers"):
        load_pipeline(folder)
    write_json(folder / "text_encoder" / "config.json", config)
    without = published._replace(parts={name: published.parts[name] for name in ("transformer", "vae")}, tokenizers=())
    with pytest.raises(ValueError, match=r"FLUX\.2 klein reads prompts by its text_encoder, and it was loaded without"):
        from_published(without)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ValueError, match="expected a tokenizer for each of 1 text encoders, got 0"):
        from_published(load_pipeline(folder))
