"""LoRAs of FLUX.2 klein as other programs write them, and ours in diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.lora import merge_lora, save_lora
from diffusion_jax.models import lora
from diffusion_jax.pipelines import from_noise
from diffusion_jax.pipelines.published import from_published
from tests.interop.flow_pipelines import SIZE, theirs_drawn
from tests.interop.original_files import (
    RANK,
    SPELLINGS,
    assert_equal,
    kohya,
    numbers,
    of_each_map,
    weights,
    write,
)
from tests.interop.test_flux2_autoencoder import theirs  # noqa: F401  (a fixture)
from tests.interop.test_flux2_files import in_original, other  # noqa: F401  (a fixture)
from tests.interop.test_flux2_klein import PROMPTS, klein  # noqa: F401  (a fixture)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)

SCALE = 0.7
MAPS = (  # of the original code
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.0.img_mlp.2",
    "single_blocks.1.linear1",
    "single_blocks.0.linear2",
    "img_in",
    "time_in.out_layer",
)
EXCHANGED = "final_layer.adaLN_modulation.1"  # diffusers leaves the halves of its updates as they are


@pytest.fixture(scope="module")
def pipeline(klein):  # noqa: F811
    """Ours, and its transformer in the original layout."""
    pipeline = load_pipeline(klein[1])
    return pipeline, in_original(weights(pipeline.denoiser), 1, 2)


def merged_in_original(pipeline, file, scale=SCALE):
    return in_original(weights(merge_lora(pipeline[0], file, scale).denoiser), 1, 2)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_the_original_maps(spelling, pipeline, tmp_path):
    """What it does to fused and exchanged maps is what it does to the original ones."""
    alpha = 1.5 if spelling in ("kohya", "ComfyUI") else None
    held, changes = of_each_map((*MAPS, EXCHANGED), pipeline[1], SPELLINGS[spelling], alpha)
    expected = {
        name: tensor + SCALE * changes.get(name.removesuffix(".weight"), 0) for name, tensor in pipeline[1].items()
    }
    found = merged_in_original(pipeline, write(tmp_path / "x.safetensors", held))
    assert_equal(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.qkv", EXCHANGED])
@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr"])
def test_other_updates_of_several_maps(kind, name, pipeline, tmp_path):
    weight, head = pipeline[1][f"{name}.weight"], f"diffusion_model.{name}"
    rows, columns = weight.shape
    if kind == "DoRA":
        down, up, length = numbers(0, RANK, columns), numbers(1, rows, RANK), np.abs(numbers(2, rows)) + 1
        held = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": length}
        direction = weight + up @ down
        expected = length[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    elif kind == "LoHa":
        factors = [numbers(i, rows, RANK) if i % 2 == 0 else numbers(i, RANK, columns) for i in range(4)]
        held = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), factors, strict=True))
        expected = weight + (factors[0] @ factors[1]) * (factors[2] @ factors[3])
    else:
        factors = numbers(0, 4, 5), numbers(1, rows // 4, columns // 5)  # in no way thirds of it
        held = dict(zip(("lokr_w1", "lokr_w2"), factors, strict=True))
        expected = weight + np.kron(*factors)
    file = write(tmp_path / "x.safetensors", {f"{head}.{leaf}": tensor for leaf, tensor in held.items()})
    found = merged_in_original(pipeline, file, 1.0)
    expected = pipeline[1] | {f"{name}.weight": expected}
    assert_equal(found, expected, rtol=1e-4, atol=1e-5)


def test_a_magnitude_of_inputs_of_several_maps_is_refused(pipeline, tmp_path):
    name = "double_blocks.0.img_attn.qkv"
    held, _ = of_each_map((name,), pipeline[1], kohya)
    columns = pipeline[1][f"{name}.weight"].shape[1]
    held[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = np.ones((1, columns), np.float32)
    with pytest.raises(ValueError, match=r"attn_to_. has a magnitude for each input of several maps"):
        merge_lora(pipeline[0], write(tmp_path / "x.safetensors", held))


@pytest.mark.parametrize("spelling", ["kohya", "original"])
def test_diffusers_fuses_the_same(spelling, klein, pipeline, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    held, _ = of_each_map(MAPS, pipeline[1], SPELLINGS[spelling], 2.0 if spelling == "kohya" else None)
    write(tmp_path / "x.safetensors", held)
    whole = klein[0]
    before = {name: tensor.clone() for name, tensor in whole.transformer.state_dict().items()}
    try:
        whole.load_lora_weights(tmp_path, weight_name="x.safetensors")
        whole.fuse_lora(lora_scale=SCALE)
        whole.unload_lora_weights()
        expected = {name: tensor.clone().numpy() for name, tensor in whole.transformer.state_dict().items()}
    finally:
        whole.transformer.load_state_dict(before)
    ours = weights(merge_lora(pipeline[0], tmp_path / "x.safetensors", SCALE).denoiser)
    assert_equal(ours, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(ours["x_embedder.weight"] - before["x_embedder.weight"].numpy()).max() > 0.1


@pytest.fixture(scope="module")
def noise():
    return numbers(0, 2, 4, 6, 12)


@pytest.fixture(scope="module")
def drawn(pipeline, noise):
    """Variables of the transformer -> pictures."""
    model = from_published(pipeline[0], SIZE)
    plan = model.published_solvers["published"](2, size=model.size)
    cond, keys = model.conditioning.of_prompts(PROMPTS), jax.random.split(jax.random.key(0), 2)

    def draw(params):
        pictures = from_noise(model._replace(params=params), jnp.asarray(noise), cond, keys, plan, 4.0)
        return np.clip(pictures / 2 + 0.5, 0, 1)

    return draw


def test_a_trained_lora_draws_the_same_in_diffusers(klein, pipeline, peer, noise, drawn, tmp_path):  # noqa: F811
    """The default maps of configs/lora.py: all attention, also of the single blocks."""
    pytest.importorskip("peft")
    params, whole = pipeline[0].denoiser.params, klein[0]
    updates = lora.init(params, 2, jax.random.key(0))
    assert len(jax.tree.leaves(updates)) == 2 * (8 * 1 + 2 * 2)
    updates = jax.tree.map(lambda leaf: 0.5 * jax.random.normal(jax.random.key(1), leaf.shape), updates)
    save_lora(tmp_path / "lora.safetensors", updates, 0.5, part="transformer")
    whole.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    try:
        expected = theirs_drawn(whole, PROMPTS, peer.tensor(noise), 2)
    finally:
        whole.unload_lora_weights()
    assert np.abs(drawn(params) - expected).max() > 0.01
    assert np.abs(drawn(lora.with_updates(params, updates, 0.5)) - expected).max() < 2e-4
    merged = merge_lora(pipeline[0], tmp_path / "lora.safetensors").denoiser.params
    assert np.abs(drawn(merged) - expected).max() < 2e-4


@pytest.mark.parametrize("writer", ["pipeline", "model"])
def test_a_lora_of_peft_draws_the_same_here(writer, klein, pipeline, peer, noise, drawn, tmp_path):  # noqa: F811
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from diffusers.training_utils import _collate_lora_metadata

    whole = klein[0]
    targets = r".*\.(to_q|add_k_proj|to_out\.0|to_qkv_mlp_proj|linear_in)|single_.*\.to_out"
    whole.transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    torch.manual_seed(0)
    try:
        for name, parameter in whole.transformer.named_parameters():
            if "lora_" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        if writer == "model":
            whole.transformer.save_lora_adapter(tmp_path, weight_name="x.safetensors")
        else:
            layers = peft.utils.get_peft_model_state_dict(whole.transformer)
            settings = _collate_lora_metadata({"transformer": whole.transformer})
            whole.save_lora_weights(tmp_path, layers, weight_name="x.safetensors", **settings)
        expected = theirs_drawn(whole, PROMPTS, peer.tensor(noise), 2)
    finally:
        whole.unload_lora_weights()
    merged = merge_lora(pipeline[0], tmp_path / "x.safetensors").denoiser.params
    assert np.abs(drawn(pipeline[0].denoiser.params) - expected).max() > 0.01
    assert np.abs(drawn(merged) - expected).max() < 2e-4


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("lora_unet_double_blocks_18_img_attn_qkv", 180, "1 updates of maps .*double_blocks_18|transformer_blocks_18"),
        ("lora_unet_double_blocks_0_img_mod_lin", 360, "img_mod_lin.* belongs to a map of FLUX.1, which FLUX.2 does"),
        ("lora_unet_single_blocks_0_modulation_lin", 180, "belongs to a map of FLUX.1"),
        ("transformer.single_transformer_blocks.0.attn.to_q", 60, "belongs to a map of FLUX.1"),
        ("transformer.transformer_blocks.0.ff.net.0.proj", 240, "belongs to a map of FLUX.1"),
        ("lora_unet_single_blocks_0_linear1", 420, r"makes \(420, 60\), the map has \(540, 60\)"),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 60, "maps that the network does not have"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj", 60, "maps that the network does not have"),
    ],
)
def test_a_lora_of_another_model_is_one_line(name, rows, message, pipeline, tmp_path):
    held = {f"{name}.lora_down.weight": numbers(0, RANK, 60), f"{name}.lora_up.weight": numbers(1, rows, RANK)}
    with pytest.raises(ValueError, match=message) as error:
        merge_lora(pipeline[0], write(tmp_path / "x.safetensors", held))
    assert "\n" not in str(error.value) and "x.safetensors" in str(error.value)
