"""FLUX.2's transformer in files of Black Forest Labs and ComfyUI, whole and quantized, and its LoRAs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import published
from diffusion_jax import build
from diffusion_jax.interop import load_autoencoder, load_pipeline, load_transformer
from diffusion_jax.interop.families import flux2_klein, flux2_names
from diffusion_jax.interop.names import differences
from diffusion_jax.interop.originals import renamed
from diffusion_jax.interop.tensors import read_json
from diffusion_jax.models.flux2 import Flux2Transformer
from tests.interop.original_files import (
    assert_equal,
    quantized,
    read,
    weights,
    write,
)
from tests.interop.test_flux2 import SMALL as TRANSFORMER
from tests.interop.test_flux2_autoencoder import theirs  # noqa: F401  (a fixture)
from tests.interop.test_flux2_klein import PROMPTS, klein  # noqa: F401  (a fixture)
from tests.interop.test_folders import peer  # noqa: F401  (a fixture)
from tests.interop.test_tokenizers import byte_pairs  # noqa: F401  (a fixture)

NAME = "Flux2Transformer2DModel"
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
OTHER = TRANSFORMER | {"in_channels": 12, "joint_attention_dim": 24, "num_layers": 3, "mlp_ratio": 2.5}
ALONE = {  # tensor of the original -> that of diffusers
    "img_in.weight": "x_embedder.weight",
    "txt_in.weight": "context_embedder.weight",
    "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
    "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
    "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
    "final_layer.linear.weight": "proj_out.weight",
}
DOUBLE = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
}
SINGLE = {
    "linear1.weight": "attn.to_qkv_mlp_proj.weight",
    "linear2.weight": "attn.to_out.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def in_original(tensors, doubles, singles):
    """The tensors of diffusers' state dict by the names and in the order of the original code."""
    found = {name: tensors[ours] for name, ours in ALONE.items()}
    scale, shift = np.split(tensors["norm_out.linear.weight"], 2)
    found["final_layer.adaLN_modulation.1.weight"] = np.concatenate([shift, scale])
    for i in range(doubles):
        ours = f"transformer_blocks.{i}"
        found |= {f"double_blocks.{i}.{name}": tensors[f"{ours}.{other}"] for name, other in DOUBLE.items()}
        for stream, maps in (
            ("img", ("to_q", "to_k", "to_v")),
            ("txt", ("add_q_proj", "add_k_proj", "add_v_proj")),
        ):
            qkv = [tensors[f"{ours}.attn.{name}.weight"] for name in maps]
            found[f"double_blocks.{i}.{stream}_attn.qkv.weight"] = np.concatenate(qkv)
    for i in range(singles):
        ours = f"single_transformer_blocks.{i}"
        found |= {f"single_blocks.{i}.{name}": tensors[f"{ours}.{other}"] for name, other in SINGLE.items()}
    return found


@pytest.fixture(scope="module")
def other(peer, tmp_path_factory):  # noqa: F811
    """Another transformer for the same pipeline: by our names, in the original layout, and in its folder."""
    transformer, folder = peer.make(NAME, OTHER), tmp_path_factory.mktemp("other")
    transformer.save_pretrained(folder)
    tensors = {name: tensor.numpy() for name, tensor in transformer.state_dict().items()}
    return tensors, in_original(tensors, OTHER["num_layers"], OTHER["num_single_layers"]), folder


def test_names_are_those_of_diffusers(other):
    """Its converter is given what `in_original` writes."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    torch = pytest.importorskip("torch")
    held = {name: torch.tensor(tensor) for name, tensor in other[1].items()}
    converted = single_file.convert_flux2_transformer_checkpoint_to_diffusers(held)
    assert_equal({name: tensor.numpy() for name, tensor in converted.items()}, other[0])


@pytest.mark.parametrize("prefix", [*PREFIXES, "in diffusers' names"])
def test_a_file_has_the_transformer_of_a_pipeline(prefix, klein, other, tmp_path):  # noqa: F811
    """Its sizes are those of the file."""
    held = other[0] if prefix not in PREFIXES else {f"{prefix}{name}": tensor for name, tensor in other[1].items()}
    found = read(flux2_klein.FAMILY, klein[1], write(tmp_path / "x.safetensors", held))
    module, variables = load_transformer(other[2])
    assert found.module == module and found.module.num_layers == 3
    jax.tree.map(np.testing.assert_array_equal, found.params, variables)


def test_the_other_parts_are_those_of_the_folder(klein, other, tmp_path):  # noqa: F811
    held = {f"diffusion_model.{name}": tensor for name, tensor in other[1].items()}
    shutil.copytree(klein[1], tmp_path / "klein", ignore=lambda folder, names: {"diffusion_pytorch_model.safetensors"})
    shutil.copy(klein[1] / "vae" / "diffusion_pytorch_model.safetensors", tmp_path / "klein" / "vae")
    file = write(tmp_path / "x.safetensors", held)  # the folder has no weights of a transformer
    config = published.get_config()
    config.update({"checkpoint": str(tmp_path / "klein"), "denoiser": str(file), "dtype": "bfloat16", "scan": True})
    found = build.model.published(config)
    module, variables = load_transformer(other[2], jnp.bfloat16, scan=True)
    assert found.denoiser.module == module
    jax.tree.map(np.testing.assert_array_equal, found.denoiser.params, variables)
    vae = load_autoencoder(klein[1] / "vae", jnp.bfloat16)[1]
    jax.tree.map(np.testing.assert_array_equal, found.autoencoder.params, vae)
    scheduler = read_json(klein[1] / "scheduler" / "scheduler_config.json")
    assert found.scheduler == scheduler and len(found.tokenizers) == 1


QUANTIZED = ("img_attn.qkv", "txt_mlp.0", "linear1", "adaLN_modulation.1")


@pytest.mark.parametrize(
    ("kind", "style"),
    [
        ("bfloat16", "bfloat16"),
        ("float8_e4m3fn", "cast"),
        ("float8_e5m2", "cast"),
        ("float8_e4m3fn", "old"),
        ("float8_e4m3fn", "header"),
        ("float8_e5m2", "header"),
        ("float8_e4m3fn", "rows"),
        ("float8_e4m3fn", "bytes"),
    ],
)
def test_half_and_float8_weights(kind, style, klein, other, tmp_path):  # noqa: F811
    held, header, expected = quantized(other[1], kind, style, "model.diffusion_model.", QUANTIZED)
    ours = weights(read(flux2_klein.FAMILY, klein[1], write(tmp_path / "x.safetensors", held, header)))
    assert_equal(in_original(ours, 3, 2), expected)


def with_layer(name, **tensors):
    return lambda held: held | {f"{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def marker(**settings):
    return np.frombuffer(json.dumps(settings).encode(), np.uint8)


LAYER = "double_blocks.0.img_mlp.0"
F8 = jnp.float8_e4m3fn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_layer(LAYER, comfy_quant=marker(format="nvfp4")), f'{LAYER} is quantized as {{"format": "nvfp4"}}; supp'),
        (with_layer(LAYER, comfy_quant=marker(format=["nvfp4"])), f'{LAYER} is quantized as {{"format": .*; supported'),
        (
            with_layer(LAYER, comfy_quant=marker(format="float8_e4m3fn", convrot=True)),
            f'{LAYER} is quantized as .*"convrot": true',
        ),
        (with_layer(LAYER, comfy_quant=marker(format="float8_e4m3fn")), f"{LAYER} is quantized .* weight_scale is mis"),
        (with_layer(LAYER, comfy_quant=np.zeros(3, np.uint8)), "malformed _quantization_metadata"),
        (with_layer(LAYER, comfy_quant=marker(format="float8_e4m3fn")[:9]), "malformed _quantization_metadata"),
        (with_layer(LAYER, weight=np.zeros((24, 7), np.uint8)), f"{LAYER}.weight is uint8: its quantization is not"),
        (with_layer(LAYER, weight=np.zeros((24, 7), np.int8)), f"{LAYER}.weight is int8: its quantization is not"),
        (with_layer(LAYER, weight_scale=np.float32(1)), f"{LAYER} has a scale and a weight of float32"),
        (with_layer("elsewhere", weight_scale=np.float32(1)), "elsewhere has a scale and no weight"),
        (with_layer("img_in", bias=np.zeros(60, np.float32)), "has unknown 1 tensor: x_embedder.bias"),
        (with_layer("more", weight=np.zeros(1, np.float32)), "has unknown 1 tensor: more.weight"),
        (with_layer("x_embedder", weight=np.zeros(1, np.float32)), "x_embedder.weight is x_embedder.weight in another"),
        (
            with_layer("double_blocks.0.img_attn.qkv", weight=np.zeros((64, 60), np.float32)),
            r"double_blocks.0.img_attn.qkv.weight has the shape \(64, 60\), expected a multiple of 3 rows",
        ),
        (
            lambda held: {name: tensor for name, tensor in held.items() if "txt_in" not in name},
            r"expected the denoiser of FLUX.2 klein, it lacks 'context_embedder.weight'",
        ),
        (
            lambda held: {name: tensor for name, tensor in held.items() if "double_blocks.1.txt_mlp.0" not in name},
            "lacks 1 tensor: transformer_blocks.1.ff_context.linear_in.weight",
        ),
        (
            lambda held: {f"diffusion_model.{n}": t for n, t in held.items()} | {"vae.x": np.zeros(1, np.float32)},
            r"expected the denoiser of FLUX.2 klein alone, it also has vae\.x",
        ),
        (
            with_layer("double_blocks.0.img_mod", **{"lin.weight": np.zeros((6, 6), np.float32)}),
            "double_blocks.0.img_mod.lin.weight belongs to a map of FLUX.1, which FLUX.2 does not have",
        ),
        (
            with_layer("txt_in", weight=np.zeros((60, 36), np.float32)),
            r"its transformer, of width 60 with 2 single blocks, reads a text of width 36, and .* width 24: name the",
        ),
        (
            with_layer("guidance_in", **{"in_layer.weight": np.zeros((60, 32), np.float32)}),
            "reads a text of width 24 and a guidance scale, and that of the checkpoint's folder",
        ),
        (with_layer("txt_in", weight=np.zeros(60, np.float32)), "it misshapes tensors of FLUX.2 klein"),
        (
            with_layer("double_blocks.0.img_attn.norm", **{"query_norm.scale": np.zeros(0, np.float32)}),
            "it misshapes tensors of FLUX.2 klein",
        ),
        (
            with_layer("img_in", weight=np.full((60, 12), np.nan, np.float32)),
            "x_embedder.weight has 720 of 720 values that are NaN",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, message, klein, other, tmp_path):  # noqa: F811
    file = write(tmp_path / "x.safetensors", change(other[1]))
    with pytest.raises(ValueError, match=message) as error:
        read(flux2_klein.FAMILY, klein[1], file)
    assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize("scale", [np.ones(3, np.float32), np.ones((), np.int32)])
def test_scales_that_do_not_fit_are_refused(scale, klein, other, tmp_path):  # noqa: F811
    torch = pytest.importorskip("torch")
    held = {name: torch.tensor(tensor) for name, tensor in other[1].items()}
    held |= {f"{LAYER}.weight": held[f"{LAYER}.weight"].to(torch.float8_e5m2), f"{LAYER}.weight_scale": scale}
    with pytest.raises(ValueError, match=rf"{LAYER} has a scale of shape .* expected one number, or one for each row"):
        read(flux2_klein.FAMILY, klein[1], write(tmp_path / "x.safetensors", held))


def test_a_transformer_alone_is_no_checkpoint(klein, other, tmp_path):  # noqa: F811
    file = write(tmp_path / "x.safetensors", other[1])
    with pytest.raises(ValueError, match="for a denoiser alone name the folder of its pipeline as the checkpoint"):
        load_pipeline(file)
    with pytest.raises(ValueError, match=r"denoiser='.*' replaces that of a folder, and .*x.safetensors is a file"):
        load_pipeline(file, parts={"denoiser": file})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors: no such file"):
        read(flux2_klein.FAMILY, klein[1], tmp_path / "nowhere.safetensors")


SIZES = {  # of the published transformers: blocks of both kinds, width, width of the text, parameters
    "4B": (5, 20, 3072, 7680, 3_875_544_576),
    "9B": (8, 24, 4096, 12288, None),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_tensor_has_its_place(size):
    """In full size, as shapes."""
    doubles, singles, width, text, parameters = SIZES[size]
    shapes = {
        "img_in.weight": (width, 128),
        "txt_in.weight": (width, text),
        "time_in.in_layer.weight": (width, 256),
        "time_in.out_layer.weight": (width, width),
        "double_stream_modulation_img.lin.weight": (6 * width, width),
        "double_stream_modulation_txt.lin.weight": (6 * width, width),
        "single_stream_modulation.lin.weight": (3 * width, width),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.linear.weight": (128, width),
    }
    for i in range(doubles):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{i}.{stream}_attn.qkv.weight": (3 * width, width),
                f"double_blocks.{i}.{stream}_attn.proj.weight": (width, width),
                f"double_blocks.{i}.{stream}_attn.norm.query_norm.scale": (128,),
                f"double_blocks.{i}.{stream}_attn.norm.key_norm.scale": (128,),
                f"double_blocks.{i}.{stream}_mlp.0.weight": (6 * width, width),
                f"double_blocks.{i}.{stream}_mlp.2.weight": (width, 3 * width),
            }
    for i in range(singles):
        shapes |= {
            f"single_blocks.{i}.linear1.weight": (9 * width, width),
            f"single_blocks.{i}.linear2.weight": (width, 4 * width),
            f"single_blocks.{i}.norm.query_norm.scale": (128,),
            f"single_blocks.{i}.norm.key_norm.scale": (128,),
        }
    held = {name: np.broadcast_to(np.float16(0), shape) for name, shape in shapes.items()}
    module = Flux2Transformer()
    ours = renamed(held, lambda path: flux2_names.NAMES.places("transformer", path, module))
    assert parameters in (None, sum(tensor.size for tensor in ours.values()))
    fields = flux2_names.sizes_of(ours, {"joint_attention_dim": text})
    network = Flux2Transformer(**fields)
    if size == "4B":
        assert network == module
    like = jax.eval_shape(network.init, jax.random.key(0), *network.example_inputs())
    assert not any(differences(ours, like))
