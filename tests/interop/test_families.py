"""A new family is a card: a made-up one, with networks and tensors under names of its own, does all that others do."""

from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax.core import schedules, solvers
from diffusion_jax.interop import families, load_pipeline, load_tokenizer, save_pipeline, verify
from diffusion_jax.interop.families import stable_diffusion_xl
from diffusion_jax.interop.lora import merge_lora, save_lora
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.tensors import read_file, read_json, write_file, write_json
from diffusion_jax.models import lora
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.unet import UNet
from diffusion_jax.pipelines import text_to_image
from diffusion_jax.pipelines.published import from_published
from tests.interop import painters
from tests.interop.test_pipeline import ADDED, TEXT_2, UNET, filled, our_pipeline, vocabulary  # noqa: F401  (a fixture)


def renamed(file):
    """Give the first convolution of a painter's file the name that its family knows."""
    tensors = {name.replace("conv_in", "entry"): np.array(tensor) for name, tensor in read_file(file).items()}
    write_file(file, tensors)


def test_the_card_is_short():
    assert len(Path(painters.__file__).read_text().splitlines()) <= 40


@pytest.fixture
def pipeline(monkeypatch, vocabulary):  # noqa: F811
    monkeypatch.setattr(families, "FAMILIES", (painters.FAMILY, *families.FAMILIES))
    parts = dict(zip(painters.FAMILY.parts, our_pipeline().parts.values(), strict=True))
    tokenizers = (load_tokenizer(vocabulary),)
    return PublishedPipeline(painters.FAMILY, parts, tokenizers, schedules.linear(), "v", painters.SCHEDULER)


def drawn(pipeline):
    model = from_published(pipeline)
    cond, keys = model.conditioning.of_prompts(["a cat", "(dogs:1.2)"]), jax.random.split(jax.random.key(0), 2)
    return text_to_image(model, cond, keys, solvers.ddim(model.schedule, 2), 3.0)


def test_it_is_saved_loaded_and_sampled(pipeline, tmp_path):
    save_pipeline(pipeline, tmp_path / "a", np.float16)
    renamed(tmp_path / "a" / "painter" / "diffusion_pytorch_model.safetensors")
    index = read_json(tmp_path / "a" / "model_index.json")
    assert index["painter"] == ["diffusers", "Painter"] and index["words"] == ["transformers", "CLIPTokenizer"]
    back = load_pipeline(tmp_path / "a")
    assert back.family == painters.FAMILY and back.prediction == "v"
    np.testing.assert_array_equal(drawn(back), drawn(pipeline))
    save_pipeline(back, tmp_path / "b", np.float16)
    renamed(tmp_path / "b" / "painter" / "diffusion_pytorch_model.safetensors")
    for file in (tmp_path / "a").rglob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_it_is_read_from_one_file(pipeline, tmp_path, monkeypatch):
    save_pipeline(pipeline, tmp_path)
    whole = {}
    for part, kind in painters.FAMILY.parts.items():
        monkeypatch.setitem(painters.CONFIGS, part, read_json(tmp_path / part / "config.json"))
        tensors = read_file(tmp_path / part / f"{kind.weights}.safetensors")
        whole |= {f"{part}/{name}": np.array(tensor) for name, tensor in tensors.items()}
    write_file(tmp_path / "whole.safetensors", whole)
    back = load_pipeline(tmp_path / "whole.safetensors", tokenizers=tmp_path)
    np.testing.assert_array_equal(drawn(back), drawn(pipeline))


@pytest.mark.slow
def test_it_takes_a_lora(pipeline, tmp_path):
    updates = lora.init(pipeline.denoiser.params, 2, jax.random.key(0))
    updates = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(1), leaf.shape), updates)
    save_lora(tmp_path / "peft.safetensors", updates, 0.5, part="painter")
    tensors = {name: np.array(tensor) for name, tensor in read_file(tmp_path / "peft.safetensors").items()}
    joined = {
        name.removesuffix(f".lora_{half}.weight").replace(".", "_").replace("painter", "painted") + f".{long}.weight": t
        for name, t in tensors.items()
        for half, long in (("A", "lora_down"), ("B", "lora_up"))
        if f".lora_{half}." in name
    }
    write_file(tmp_path / "joined.safetensors", joined)
    module, inputs = pipeline.denoiser.module, painters.PAINTER.inputs(pipeline.denoiser.module)
    run = jax.jit(lambda params: module.apply(params, inputs["x"], inputs["t"], {"text": inputs["text"]}))
    expected = run(lora.with_updates(pipeline.denoiser.params, updates, 0.5))
    for file in ("peft", "joined"):
        found = run(merge_lora(pipeline, tmp_path / f"{file}.safetensors").denoiser.params)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_it_is_verified(pipeline, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "PEER_PACKAGES", ("a package that is not there",))
    save_pipeline(pipeline, tmp_path)
    assert verify.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count(", all as ") == 3


def test_a_pipeline_without_its_text_encoder_is_loaded_and_saved_but_not_sampled(tmp_path):
    save_pipeline(our_pipeline(), tmp_path / "a")
    index = read_json(tmp_path / "a" / "model_index.json")
    write_json(tmp_path / "a" / "model_index.json", index | {"text_encoder": [None, None]})
    pipeline = load_pipeline(tmp_path / "a")
    assert list(pipeline.parts) == ["unet", "vae"]
    save_pipeline(pipeline, tmp_path / "b")
    assert list(load_pipeline(tmp_path / "b").parts) == ["unet", "vae"]
    with pytest.raises(ValueError, match="reads prompts by its text_encoder, and it was loaded without"):
        from_published(pipeline)


def test_a_text_encoder_that_is_named_and_missing_is_one_line(tmp_path):
    """A folder of SDXL without its first encoder's files is not taken for a refiner."""
    unet, second = UNet(**UNET | ADDED), ClipTextEncoder(**TEXT_2)
    parts = {"unet": filled(unet, *unet.example_inputs()), "text_encoder_2": filled(second, *second.example_inputs())}
    save_pipeline(our_pipeline(parts, stable_diffusion_xl.FAMILY), tmp_path)
    assert load_pipeline(tmp_path).family == stable_diffusion_xl.FAMILY
    (tmp_path / "text_encoder" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config.json: no such file"):
        load_pipeline(tmp_path)
    index = read_json(tmp_path / "model_index.json")
    write_json(tmp_path / "model_index.json", index | {"text_encoder": [None, None]})
    refiner = load_pipeline(tmp_path)
    assert refiner.family == stable_diffusion_xl.REFINER
    with pytest.raises(ValueError, match="the refiner of Stable Diffusion XL needs more than a prompt"):
        from_published(refiner)


@pytest.mark.parametrize("entry", [None, [], [None], [None, None], "text"])
def test_entries_of_the_index_that_name_nothing(entry):
    index = {"text_encoder": entry, "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    configs = {"unet": {"addition_embed_type": "text_time"}}
    assert stable_diffusion_xl.REFINER.recognises(index, configs) == (entry != "text")


def test_what_no_card_recognises_is_one_line(tmp_path):
    write_json(tmp_path / "model_index.json", {"_class_name": "SomePipeline", "transformer": ["diffusers", "Some"]})
    with pytest.raises(ValueError, match=r"one of .*Stable Diffusion 1, .*; got SomePipeline with transformer"):
        load_pipeline(tmp_path)
