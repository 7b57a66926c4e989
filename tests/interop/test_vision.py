"""Image encoders against transformers, on random weights from its folders."""

import importlib
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion_jax.evaluation.networks import feature_network
from diffusion_jax.interop.tensors import write_file
from diffusion_jax.interop.vision import load_image_encoder
from diffusion_jax.models.vision.vision import ImageEncoder
from tests.interop import test_pipeline

vocabulary = test_pipeline.vocabulary  # a fixture
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
CLIP = SMALL | {"intermediate_size": 40, "projection_dim": 10, "image_size": 28, "patch_size": 7}


def saved(transformers, folder, name):
    """A random model of transformers, saved in the folder."""
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    if name == "Dinov2Model":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=70, patch_size=14))
    elif name == "CLIPModel":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        text |= {"vocab_size": 55, "max_position_embeddings": 9, "bos_token_id": 53, "eos_token_id": 54}
        model = transformers.CLIPModel(transformers.CLIPConfig(vision_config=CLIP, text_config=text, projection_dim=10))
    else:
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**CLIP))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "CLIPModel", "Dinov2Model"])
def test_features_equal_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    torch = pytest.importorskip("torch", reason="the reference is not installed")
    model = saved(transformers, tmp_path, name)
    loaded = load_image_encoder(tmp_path)
    encoder, params = loaded.encoder, loaded.params
    assert loaded.name == ("DINOv2" if name == "Dinov2Model" else "CLIP") and loaded.mean[0] < 0.5
    shown = np.random.default_rng(0).integers(0, 256, (2, encoder.image_size, encoder.image_size, 3), dtype=np.uint8)
    images = ((shown / 255 - loaded.mean) / loaded.deviation).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        if name == "Dinov2Model":
            expected = model(pixels).pooler_output
        elif name == "CLIPModel":
            expected = model.visual_projection(model.vision_model(pixels).pooler_output)
        else:
            expected = model(pixels).image_embeds
    found = jax.jit(encoder.apply)(params, images)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5 * np.abs(expected.numpy()).max())
    through = feature_network(f"encoder:{tmp_path}").extract(list(shown))["features"]
    np.testing.assert_allclose(through, found, atol=1e-4 * np.abs(found).max())


def test_prompts_are_in_the_same_space_as_pictures(vocabulary, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the reference is not installed")
    torch = pytest.importorskip("torch", reason="the reference is not installed")
    model = saved(transformers, tmp_path, "CLIPModel")
    for file in vocabulary.iterdir():
        shutil.copy(file, tmp_path)
    network = feature_network(f"encoder:{tmp_path}")
    prompts, tokenizer = ["the cat", "a"], transformers.CLIPTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer(prompts, padding="max_length", max_length=9, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model.text_projection(model.text_model(tokens["input_ids"]).pooler_output).numpy()
    np.testing.assert_allclose(network.texts(prompts), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertModel"]}, "expected the architecture of an image encoder, .* got BertModel"),
        ({"architectures": ["Dinov2Model"], "use_swiglu_ffn": True}, "use_swiglu_ffn .* not supported"),
    ],
)
def test_another_model_is_named(config, message, tmp_path):
    write_file(tmp_path / "model.safetensors", {"a": np.zeros(1)})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_image_encoder(tmp_path)


def test_images_of_another_size_are_named():
    encoder = ImageEncoder(8, 8, None, 1, 1, 8, 4)
    with pytest.raises(ValueError, match="reads images of 8x8 in patches of 4, got 12x8"):
        jax.eval_shape(encoder.init, jax.random.key(0), np.zeros((1, 12, 8, 3)))
