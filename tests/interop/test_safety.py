"""The safety checker against that of diffusers, on random weights from its folder."""

import importlib

import numpy as np
import pytest

from diffusion_jax.interop.safety import load_safety_checker
from diffusion_jax.interop.tensors import read_file, write_file
from tests.interop.test_vision import CLIP

FILE = "model.safetensors"


@pytest.fixture
def theirs(tmp_path):
    """A random safety checker of diffusers, saved in tmp_path."""
    torch = pytest.importorskip("torch", reason="the reference is not installed")
    pytest.importorskip("diffusers", reason="the reference is not installed")
    transformers = importlib.import_module("transformers")
    module = importlib.import_module("diffusers.pipelines.stable_diffusion.safety_checker")
    torch.manual_seed(0)
    made = module.StableDiffusionSafetyChecker(transformers.CLIPConfig(vision_config=CLIP, projection_dim=10)).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(tmp_path)
    return made


def test_the_same_images_are_flagged(theirs, tmp_path):
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    rng = np.random.default_rng(0)
    images = [np.kron(rng.integers(0, 256, (5, 4, 3)), np.ones((8, 8, 1))).astype(np.uint8) for _ in range(60)]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = theirs.visual_projection(theirs.vision_model(pixels)[1])
        cosines = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(theirs.concept_embeds).T
        care = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(theirs.special_care_embeds).T
    theirs.concept_embeds_weights.data = cosines.quantile(0.93, dim=0) + 0.002
    flagged_with = []
    for part in (1.1, 0.9):  # of the images that need no special care
        theirs.special_care_embeds_weights.data = care.quantile(min(part, 1.0), dim=0) + (part > 1)
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            _, flagged = theirs(clip_input=pixels, images=np.zeros((len(images), 1)))
        np.testing.assert_array_equal(load_safety_checker(tmp_path).flagged(np.stack(images)), flagged)
        flagged_with.append(sum(flagged))
    assert 0 < flagged_with[0] < flagged_with[1] < len(images)


def test_special_care_lowers_all_thresholds(theirs, tmp_path):
    checker = load_safety_checker(tmp_path)
    images = np.random.default_rng(1).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    never, always = (checker._replace(special_thresholds=np.full(3, least)) for least in (2.0, -2.0))
    lower = never._replace(thresholds=never.thresholds - 0.01)
    np.testing.assert_array_equal(always.flagged(images), lower.flagged(images))


def test_another_layout_is_one_clear_error(theirs, tmp_path):
    tensors = {name: np.array(tensor) for name, tensor in read_file(tmp_path / FILE).items()}
    del tensors["concept_embeds"]
    write_file(tmp_path / FILE, tensors)
    with pytest.raises(ValueError, match=rf"{FILE}: expected a safety checker with .*; it lacks concept_embeds$"):
        load_safety_checker(tmp_path)


def test_a_threshold_that_is_not_finite_is_refused(theirs, tmp_path):
    """It would flag nothing."""
    tensors = {name: np.array(tensor) for name, tensor in read_file(tmp_path / FILE).items()}
    tensors["concept_embeds_weights"][3] = np.nan
    write_file(tmp_path / FILE, tensors)
    with pytest.raises(ValueError, match=rf"{FILE}: concept_embeds_weights has 1 of 17 values that are NaN"):
        load_safety_checker(tmp_path)
