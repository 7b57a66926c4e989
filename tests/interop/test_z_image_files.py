"""Z-Image's transformer in files of ComfyUI, whole and quantized, and its LoRAs."""

import jax
import numpy as np
import pytest

from diffusion_jax.core import schedules
from diffusion_jax.interop import load_transformer
from diffusion_jax.interop.families import z_image
from diffusion_jax.interop.lora import merge_lora
from diffusion_jax.interop.names import differences
from diffusion_jax.interop.originals import renamed
from diffusion_jax.interop.pipeline import Part, PublishedPipeline
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.models import lora
from diffusion_jax.models.z_image import ZImageTransformer
from tests.interop.original_files import (
    RANK,
    SPELLINGS,
    assert_equal,
    numbers,
    of_each_map,
    quantized,
    read,
    weights,
    write,
)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_z_image import NAME, SMALL

FAMILY = z_image.FAMILY
LAYERS = {"noise_refiner": 1, "context_refiner": 1, "layers": 2}
SCALE = 0.7


def in_original(tensors, layers=LAYERS):
    """The tensors of diffusers' state dict by the names of the original code, with the norm that it does not use."""
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("all_x_embedder.2-1.", "x_embedder.").replace("all_final_layer.2-1.", "final_layer.")
        name = name.replace("attention.to_out.0.", "attention.out.")
        name = name.replace("attention.norm_q.", "attention.q_norm.").replace("attention.norm_k.", "attention.k_norm.")
        if ".attention.to_" not in name:
            found[name] = tensor
    for block in (f"{kind}.{i}" for kind, count in layers.items() for i in range(count)):
        qkv = [tensors[f"{block}.attention.to_{letter}.weight"] for letter in "qkv"]
        found[f"{block}.attention.qkv.weight"] = np.concatenate(qkv)
    return found | {"norm_final.weight": np.ones(len(found["x_embedder.bias"]), np.float32)}


@pytest.fixture(scope="module")
def network(peer, tmp_path_factory):  # noqa: F811
    """diffusers' transformer, its tensors by its names and by those of the original, and its folder."""
    transformer, folder = peer.make(NAME, SMALL), tmp_path_factory.mktemp("z_image")
    transformer.save_pretrained(folder / "transformer")
    tensors = {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}
    return transformer, tensors, in_original(tensors), folder


@pytest.fixture(scope="module")
def pipeline(network):
    """A pipeline without the other parts."""
    part = Part(*load_transformer(network[3] / "transformer"))
    return PublishedPipeline(FAMILY, {"transformer": part}, (), schedules.flow(), "flow")


def test_names_are_those_of_diffusers(network):
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    held = {f"model.diffusion_model.{name}": torch.tensor(tensor) for name, tensor in network[2].items()}
    converted = single_file.convert_z_image_transformer_checkpoint_to_diffusers(held)
    assert_equal({name: tensor.numpy() for name, tensor in converted.items()}, network[1])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_file_has_the_transformer_of_a_pipeline(prefix, network, tmp_path):
    """Its sizes are those of the file: the folder says another depth and width."""
    folder = tmp_path / "folder"
    config = read_json(network[3] / "transformer" / "config.json")
    write_json(folder / "transformer" / "config.json", config | {"n_layers": 3, "dim": 28, "n_heads": 2})
    held = {f"{prefix}{name}": tensor for name, tensor in network[2].items()}
    found = read(FAMILY, folder, write(tmp_path / "x.safetensors", held))
    module, variables = load_transformer(network[3] / "transformer")
    assert found.module == module
    jax.tree.map(np.testing.assert_array_equal, found.params, variables)


@pytest.mark.parametrize("style", ["old", "header", "rows"])
def test_float8_weights(style, network, tmp_path):
    layers = ("attention.qkv", "feed_forward.w1", "adaLN_modulation.0", "attention.out")
    held, header, expected = quantized(network[2], "float8_e4m3fn", style, "model.diffusion_model.", layers)
    found = in_original(weights(read(FAMILY, network[3], write(tmp_path / "x.safetensors", held, header))))
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("cap_embedder.1.weight", np.zeros((42, 12), np.float32), "reads a text of width 12, and .* one of width 10"),
        ("layers.0.attention.qkv.weight", np.zeros((25, 42), np.float32), "expected a multiple of 3 rows"),
        ("layers.0.attention.qkv.weight", np.zeros((126, 21), np.uint8), "is uint8: its quantization is not supported"),
        ("siglip_embedder.0.weight", np.zeros(4, np.float32), "has unknown 1 tensor: siglip_embedder.0.weight"),
    ],
)
def test_what_does_not_fit_is_one_line(name, tensor, message, network, tmp_path):
    file = write(tmp_path / "x.safetensors", network[2] | {name: tensor})
    with pytest.raises(ValueError, match=message) as error:
        read(FAMILY, network[3], file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_every_published_tensor_has_its_place():
    """In full size, as shapes."""
    shapes = {
        "x_embedder.weight": (3840, 64),
        "x_embedder.bias": (3840,),
        "final_layer.linear.weight": (64, 3840),
        "final_layer.linear.bias": (64,),
        "final_layer.adaLN_modulation.1.weight": (3840, 256),
        "final_layer.adaLN_modulation.1.bias": (3840,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (256, 1024),
        "t_embedder.mlp.2.bias": (256,),
        "cap_embedder.0.weight": (2560,),
        "cap_embedder.1.weight": (3840, 2560),
        "cap_embedder.1.bias": (3840,),
        "x_pad_token": (1, 3840),
        "cap_pad_token": (1, 3840),
        "norm_final.weight": (3840,),
    }
    for kind, count in (("noise_refiner", 2), ("context_refiner", 2), ("layers", 30)):
        for block in (f"{kind}.{i}" for i in range(count)):
            shapes |= {f"{block}.{norm}{i}.weight": (3840,) for norm in ("attention_norm", "ffn_norm") for i in (1, 2)}
            shapes |= {f"{block}.attention.{letter}_norm.weight": (128,) for letter in "qk"}
            shapes |= {f"{block}.feed_forward.{name}.weight": (10240, 3840) for name in ("w1", "w3")}
            shapes |= {
                f"{block}.feed_forward.w2.weight": (3840, 10240),
                f"{block}.attention.qkv.weight": (3 * 3840, 3840),
                f"{block}.attention.out.weight": (3840, 3840),
            }
            if kind != "context_refiner":
                shapes |= {f"{block}.adaLN_modulation.0.weight": (15360, 256)}
                shapes |= {f"{block}.adaLN_modulation.0.bias": (15360,)}
    held = {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}
    network = ZImageTransformer()
    ours = renamed(held, lambda path: FAMILY.names.places("transformer", path, network))
    assert sum(tensor.size for tensor in ours.values()) == 6_154_908_736
    fields = FAMILY.sizes_of(ours, {"cap_feat_dim": 2560})
    assert all(getattr(network, name) == value for name, value in fields.items())
    like = jax.eval_shape(network.clone(scan=True).init, jax.random.key(0), *network.example_inputs())
    assert not any(differences(ours, like))


MAPS = (
    "layers.1.attention.qkv",
    "noise_refiner.0.attention.qkv",
    "context_refiner.0.attention.out",
    "layers.0.feed_forward.w2",
    "layers.0.adaLN_modulation.0",
    "x_embedder",
    "final_layer.linear",
)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_the_original_maps(spelling, network, pipeline, tmp_path):
    alpha = 1.5 if spelling in ("kohya", "ComfyUI") else None
    held, changes = of_each_map(MAPS, network[2], SPELLINGS[spelling], alpha)
    expected = {
        name: tensor + SCALE * changes.get(name.removesuffix(".weight"), 0) for name, tensor in network[2].items()
    }
    merged = merge_lora(pipeline, write(tmp_path / "x.safetensors", held), SCALE)
    assert_equal(in_original(weights(merged.denoiser)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", ["lora_unet_{}", "transformer.{}", "diffusion_model.{}", "lora_transformer_{}"])
def test_a_lora_of_the_maps_of_diffusers(spelling, network, pipeline, tmp_path):
    name = "layers.1.attention.to_out.0"
    down, up = numbers(0, RANK, 42), numbers(1, 42, RANK)
    head = spelling.format(name.replace(".", "_") if spelling.endswith("_{}") else name)
    halves = ("lora_A", "lora_B") if head.startswith("transformer") else ("lora_down", "lora_up")
    held = {f"{head}.{half}.weight": tensor for half, tensor in zip(halves, (down, up), strict=True)}
    found = weights(merge_lora(pipeline, write(tmp_path / "x.safetensors", held)).denoiser)
    expected = network[1] | {f"{name}.weight": network[1][f"{name}.weight"] + up @ down}
    assert_equal(found, expected, rtol=1e-5, atol=1e-5)


def test_a_lora_of_peft_is_fused_the_same(network, pipeline, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformer = network[0]
    transformer.add_adapter(peft.LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "to_v", "to_out.0", "w1"]))
    torch.manual_seed(0)
    try:
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
        transformer.save_lora_adapter(tmp_path, weight_name="x.safetensors")
        transformer.fuse_lora(lora_scale=SCALE)
        state = transformer.state_dict().items()
        theirs = {name.replace(".base_layer", ""): t.numpy().copy() for name, t in state if "lora_" not in name}
    finally:
        transformer.unfuse_lora()
        transformer.delete_adapters("default")
    ours = weights(merge_lora(pipeline, tmp_path / "x.safetensors", SCALE).denoiser)
    assert_equal(ours, {name: theirs[name] for name in ours}, rtol=1e-4, atol=1e-5)
    assert np.abs(ours["layers.0.attention.to_q.weight"] - network[1]["layers.0.attention.to_q.weight"]).max() > 0.05


def test_all_attention_is_trained_by_default(pipeline):
    updates = lora.init(pipeline.denoiser.params, 2, jax.random.key(0))
    assert len(jax.tree.leaves(updates)) == 2 * 4 * sum(LAYERS.values())
