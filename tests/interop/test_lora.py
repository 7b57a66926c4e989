"""Low-rank updates: the formula for every naming scheme, and equality with the weights that diffusers fuses."""

import jax
import numpy as np
import pytest

from diffusion_jax.interop import load_pipeline
from diffusion_jax.interop.lora import load_lora, merge_lora
from diffusion_jax.interop.names import to_torch
from diffusion_jax.interop.tensors import write_file
from tests.interop.test_pipeline import our_pipeline, published, vocabulary  # noqa: F401  (a fixture)

MAP = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
TEXT_MAP = "text_model.encoder.layers.1.self_attn.q_proj"
CONV = "down_blocks.0.resnets.0.conv1"
RANK, SCALE = 3, 0.7


@pytest.fixture(scope="module")
def pipeline():
    return our_pipeline()


def halves(shape):
    """down and up of a map whose weight has `shape`, (out, in, …)."""
    rng = np.random.default_rng(0)
    down, up = rng.normal(size=(RANK, *shape[1:])), rng.normal(size=(shape[0], RANK, *(1,) * (len(shape) - 2)))
    return down.astype(np.float32), up.astype(np.float32)


def weights(part):
    return {name: np.asarray(tensor) for name, tensor in to_torch(part.params).items()}


SPELLINGS = {  # of (a map of the U-Net, a map of the text encoder): name of down, name of up
    "kohya": lambda part, name: [
        f"lora_{'te' if part == 'text_encoder' else part}_{name.replace('.', '_')}.lora_{half}.weight"
        for half in ("down", "up")
    ],
    "peft": lambda part, name: [f"{part}.{name}.lora_{half}.weight" for half in "AB"],
    "diffusers": lambda part, name: [f"{part}.{name}.lora.{half}.weight" for half in ("down", "up")],
    "processors": lambda part, name: [
        f"{part}.{name.replace('attn1.', 'attn1.processor.').replace('to_out.0', 'to_out').replace('q_proj', 'to_q')}"
        f"_lora.{half}.weight"
        for half in ("down", "up")
    ],
}


@pytest.mark.parametrize("alpha", [None, 1.5])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_formula_for_every_spelling(spelling, alpha, pipeline, tmp_path):
    held, changes = {}, {}
    for part, module, name in (("unet", pipeline.denoiser, MAP), ("text_encoder", pipeline.text_encoders[0], TEXT_MAP)):
        down, up = halves(weights(module)[f"{name}.weight"].shape)
        names = SPELLINGS[spelling](part, name)
        held |= dict(zip(names, (down, up), strict=True))
        if alpha is not None:
            held[names[0][: names[0].index("lora", 5)].rstrip("._") + ".alpha"] = np.float32(alpha).reshape(())
        changes[part, f"{name}.weight"] = SCALE * (alpha or RANK) / RANK * up @ down
    if alpha is not None and spelling == "processors":
        pytest.skip("these files know no alpha")
    write_file(tmp_path / "lora.safetensors", {name: np.asarray(tensor) for name, tensor in held.items()})
    merged = merge_lora(pipeline, tmp_path / "lora.safetensors", SCALE)
    pairs = {
        "unet": (pipeline.denoiser, merged.denoiser),
        "text_encoder": (pipeline.text_encoders[0], merged.text_encoders[0]),
    }
    for part, (before, after) in pairs.items():
        after = weights(after)
        for name, tensor in weights(before).items():
            np.testing.assert_allclose(after[name], tensor + changes.get((part, name), 0), rtol=1e-6, atol=1e-6)


def test_convolutions_and_maps_stored_as_such(pipeline, tmp_path):
    held, changes = {}, {}
    for name in (CONV, MAP):
        shape = weights(pipeline.denoiser)[f"{name}.weight"].shape
        down, up = halves(shape if len(shape) == 4 else (*shape, 1, 1))
        head = f"lora_unet_{name.replace('.', '_')}"
        held |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}
        changes[f"{name}.weight"] = np.einsum("or,rihw->oihw", up[:, :, 0, 0], down).reshape(shape)
    write_file(tmp_path / "lora.safetensors", held)
    after = weights(merge_lora(pipeline, tmp_path / "lora.safetensors").denoiser)
    for name, tensor in weights(pipeline.denoiser).items():
        np.testing.assert_allclose(after[name], tensor + changes.get(name, 0), rtol=1e-6, atol=1e-6)


def test_names_of_the_original_code(pipeline, tmp_path):
    denoiser = pipeline.denoiser
    pipeline = pipeline.with_denoiser(denoiser._replace(module=denoiser.module.clone(layers_per_block=2)))
    down, up = halves((4, 5))
    names = ("input_blocks_4_1_transformer_blocks_0_attn2_to_k", "output_blocks_2_1_proj_in")
    held = {f"lora_unet_{n}.lora_{h}.weight": t for n in names for h, t in (("down", down), ("up", up))}
    held |= {f"lora_te2_text_projection.lora_{h}.weight": t for h, t in (("down", down), ("up", up))}
    write_file(tmp_path / "lora.safetensors", held)
    found = {part: list(updates) for part, updates in load_lora(tmp_path / "lora.safetensors", pipeline).items()}
    assert found == {
        "unet": [
            "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
            "up_blocks_0_attentions_2_proj_in",
        ],
        "text_encoder_2": ["text_projection"],
    }


def test_names_with_dots_of_the_original_code(pipeline, tmp_path):
    """ComfyUI's: the denoiser as in the checkpoint of one file, and text encoders as it holds them in memory.
    OneTrainer's (OMI): short names of the parts. Beginnings with underscores are also written with a dot.
    """
    down, up = halves((4, 5))
    expected = {
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0": ("unet", MAP),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (
            "unet",
            MAP.replace("to_out.0", "to_q"),
        ),
        "diffusion_model.input_blocks.1.0.in_layers.2": ("unet", CONV),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.self_attn.q_proj": ("text_encoder", TEXT_MAP),
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.q_proj": ("text_encoder_2", TEXT_MAP),
        "base_model.model.unet.down_blocks.0.resnets.0.time_emb_proj": (
            "unet",
            "down_blocks.0.resnets.0.time_emb_proj",
        ),
        "lycoris_down_blocks_0_resnets_0_conv2": ("unet", "down_blocks_0_resnets_0_conv2"),
        "lycoris_unet_down_blocks_0_resnets_1_conv1": ("unet", "down_blocks_0_resnets_1_conv1"),
        "lycoris_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "text_model_encoder_layers_0_mlp_fc1"),
        "unet.middle_block.0.out_layers.3": ("unet", "mid_block.resnets.0.conv2"),
        "unet.time_embed.0": ("unet", "time_embedding.linear_1"),
        "clip_l.text_model.encoder.layers.0.mlp.fc2": ("text_encoder", "text_model.encoder.layers.0.mlp.fc2"),
        "clip_g.text_projection": ("text_encoder_2", "text_projection"),
        "lora_unet.down_blocks.0.resnets.1.conv2": ("unet", "down_blocks.0.resnets.1.conv2"),
        "lora_te2.text_model.encoder.layers.0.mlp.fc1": ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"),
    }
    held = {f"{name}.{half}.weight": tensor for name in expected for half, tensor in (("lora_A", down), ("lora_B", up))}
    write_file(tmp_path / "lora.safetensors", held)
    found = {(part, m) for part, maps in load_lora(tmp_path / "lora.safetensors", pipeline).items() for m in maps}
    assert found == {(part, path.replace(".", "_")) for part, path in expected.values()}


def test_another_model_is_named(pipeline, tmp_path):
    """Flux by OneTrainer's names."""
    down, up = halves((4, 5))
    name = "lora_transformer_single_transformer_blocks_0_attn_to_q"
    write_file(tmp_path / "x.safetensors", {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up})
    with pytest.raises(ValueError, match=f"network does not have, such as {name}; it was made for another model, or"):
        merge_lora(pipeline, tmp_path / "x.safetensors")


def test_dora_and_lokr_are_merged_by_their_names(pipeline, tmp_path):
    """A DoRA of a text encoder and LoKr of a convolution, by the names of diffusers and LyCORIS."""
    text, conv = (weights(part)[f"{name}.weight"] for part, name in (
        (pipeline.text_encoders[0], TEXT_MAP), (pipeline.denoiser, CONV)))  # fmt: skip
    down, up = halves(text.shape)
    length = np.linspace(1, 2, len(text), dtype=np.float32)
    head = f"text_encoder.{TEXT_MAP.replace('q_proj', 'to_q')}"
    held = {
        f"{head}_lora.down.weight": down,
        f"{head}_lora.up.weight": up,
        f"{head}.lora_magnitude_vector": length,
    }
    first, second = np.float32([[1, -1]]), np.ones((len(conv), conv.shape[1] // 2, *conv.shape[2:]), np.float32)
    names = (f"lora_unet_{CONV.replace('.', '_')}.{factor}" for factor in ("lokr_w1", "lokr_w2"))
    held |= dict(zip(names, (first, second), strict=True))
    write_file(tmp_path / "x.safetensors", held)
    merged = merge_lora(pipeline, tmp_path / "x.safetensors", SCALE)
    direction = text + SCALE * up @ down
    expected = length[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(weights(merged.text_encoders[0])[f"{TEXT_MAP}.weight"], expected, rtol=1e-5, atol=1e-6)
    sign = np.repeat(np.float32([1, -1]), conv.shape[1] // 2)[:, None, None]
    np.testing.assert_allclose(weights(merged.denoiser)[f"{CONV}.weight"], conv + SCALE * sign, rtol=1e-5, atol=1e-6)


def test_what_was_merged_can_be_taken_out(pipeline, tmp_path):
    down, up = halves(weights(pipeline.denoiser)[f"{MAP}.weight"].shape)
    write_file(tmp_path / "x.safetensors", dict(zip(SPELLINGS["peft"]("unet", MAP), (down, up), strict=True)))
    back = merge_lora(merge_lora(pipeline, tmp_path / "x.safetensors", 0.5), tmp_path / "x.safetensors", -0.5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back.denoiser.params, pipeline.denoiser.params
    )


def test_the_alpha_of_metadata(tmp_path):
    down, up = halves((4, 5))
    metadata = {"lora_adapter_metadata": '{"unet.r": 3, "unet.lora_alpha": 6}'}
    held = dict(zip(SPELLINGS["peft"]("unet", MAP), (down, up), strict=True))
    write_file(tmp_path / "x.safetensors", held, metadata=metadata)
    (update,) = load_lora(tmp_path / "x.safetensors")["unet"].values()
    assert update.alpha == 6


DOWN, UP = np.zeros((RANK, 16), np.float32), np.zeros((16, RANK), np.float32)


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"unet.nowhere.lora_A.weight": DOWN, "unet.nowhere.lora_B.weight": UP}, "1 updates of maps that .* nowhere"),
        ({f"unet.{MAP}.lora_A.weight": DOWN}, "needs both halves of an update, of one rank"),
        (
            {f"unet.{MAP}.lora_A.weight": DOWN, f"unet.{MAP}.lora_B.a.weight": UP, f"unet.{MAP}.lora_B.b.weight": UP},
            "two tensors of lora_up, such as those of two adapters",
        ),
        ({f"unet.{MAP}.lora_A.weight": DOWN, f"unet.{MAP}.lora_B.weight": UP[:, :2]}, "of one rank"),
        ({f"unet.{MAP}.lora_A.weight": DOWN[:, :4], f"unet.{MAP}.lora_B.weight": UP}, "the map has"),
        ({f"unet.{MAP}.lora_A.weight": DOWN[:0], f"unet.{MAP}.lora_B.weight": UP[:, :0]}, "of one rank"),
        ({f"unet.{MAP}.lora_A.weight": DOWN[..., None], f"unet.{MAP}.lora_B.weight": UP[..., :2]}, "of one rank"),
        ({f"unet.{MAP}.lora_A.weight": np.zeros((RANK, 4, 4)), f"unet.{MAP}.lora_B.weight": UP}, "the map has"),
        ({f"unet.{MAP}.hada_w1_a": DOWN}, "needs both halves of an update"),
        ({f"unet.{MAP}.diff": DOWN}, "diff belongs to full differences of weights .*; supported are LoRA, LoCon, DoRA"),
        ({"lora_te2_x.lora_down.weight": DOWN, "lora_te2_x.lora_up.weight": UP}, "text_encoder_2, which this pipeline"),
    ],
)
def test_what_does_not_fit_is_one_line(held, message, pipeline, tmp_path):
    write_file(tmp_path / "x.safetensors", held)
    with pytest.raises(ValueError, match=message) as raised:
        merge_lora(pipeline, tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


def test_is_what_the_peer_fuses(vocabulary, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    whole = published("sd", vocabulary, tmp_path / "pipeline")
    pipeline = load_pipeline(tmp_path / "pipeline")
    held = {}
    for lora, module, name in (
        ("lora_unet", pipeline.denoiser, MAP),
        ("lora_unet", pipeline.denoiser, CONV),
        ("lora_te", pipeline.text_encoders[0], TEXT_MAP),
        ("lora_te", pipeline.text_encoders[0], TEXT_MAP.replace("q_proj", "out_proj")),  # the peer knows files by it
    ):
        down, up = halves(weights(module)[f"{name}.weight"].shape)
        head = f"{lora}_{name.replace('.', '_')}"
        held |= {f"{head}.lora_down.weight": down, f"{head}.lora_up.weight": up}
        held[f"{head}.alpha"] = np.array(1.5, np.float32)
    write_file(tmp_path / "lora.safetensors", held)
    whole.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    whole.fuse_lora(lora_scale=SCALE)
    whole.unload_lora_weights()
    merged = merge_lora(pipeline, tmp_path / "lora.safetensors", SCALE)
    theirs = {name: tensor.numpy() for name, tensor in whole.unet.state_dict().items()}
    ours = weights(merged.denoiser)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)
    theirs = {
        name.removeprefix("text_model."): tensor.numpy() for name, tensor in whole.text_encoder.state_dict().items()
    }
    for name, tensor in weights(merged.text_encoders[0]).items():
        np.testing.assert_allclose(tensor, theirs[name.removeprefix("text_model.")], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("writer", "changes"),
    [("pipeline", {"use_dora": True}), ("model", {"use_rslora": True, "alpha_pattern": {"attn1.to_q": 9}})],
)
def test_is_what_the_peer_trained_and_saved(changes, writer, vocabulary, tmp_path):  # noqa: F811
    """Linear maps and convolutions; the settings are in the header, in two ways."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    whole = published("sd", vocabulary, tmp_path / "pipeline")
    pipeline = load_pipeline(tmp_path / "pipeline")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_out.0", "conv1", "time_emb_proj"], **changes
    )
    whole.unet.add_adapter(config)
    for parameter in whole.unet.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.rand_like(parameter)
    if writer == "model":
        whole.unet.save_lora_adapter(tmp_path, weight_name="lora.safetensors")
    else:
        from diffusers.training_utils import _collate_lora_metadata
        from diffusers.utils import convert_state_dict_to_diffusers

        layers = convert_state_dict_to_diffusers(peft.utils.get_peft_model_state_dict(whole.unet))
        whole.save_lora_weights(
            tmp_path, layers, weight_name="lora.safetensors", **_collate_lora_metadata({"unet": whole.unet})
        )
    merged = weights(merge_lora(pipeline, tmp_path / "lora.safetensors", SCALE).denoiser)
    whole.unet.fuse_lora(lora_scale=SCALE)
    theirs = {name.replace(".base_layer", ""): tensor for name, tensor in whole.unet.state_dict().items()}
    for name, tensor in merged.items():
        np.testing.assert_allclose(tensor, theirs[name].numpy(), rtol=1e-4, atol=1e-5, err_msg=name)
    before = weights(pipeline.denoiser)[f"{CONV}.weight"]
    assert np.abs(merged[f"{CONV}.weight"] - before).max() > 0.05
