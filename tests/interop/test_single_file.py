"""Checkpoints in one file: tiny ones with the original names become the state dicts of diffusers and transformers."""

import functools
import re
import types

import jax
import ml_dtypes
import numpy as np
import pytest

from diffusion_jax.core import schedules
from diffusion_jax.interop import single_file
from diffusion_jax.interop.families import stable_diffusion_1, stable_diffusion_2, stable_diffusion_xl
from diffusion_jax.interop.families.latent_diffusion import unet_name
from diffusion_jax.interop.folders import autoencoder_of, unet_of
from diffusion_jax.interop.names import from_torch, to_torch
from diffusion_jax.interop.noise_schedules import schedule_of
from diffusion_jax.interop.single_file import read_checkpoint, read_denoiser
from diffusion_jax.interop.tensors import write_file

UNET = {"_class_name": "UNet2DConditionModel", "layers_per_block": 2, "block_out_channels": [32, 64]}
CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
}
WIDE = {"block_out_channels": [64, 128], "use_linear_projection": True, "attention_head_dim": [1, 2]}
UNETS = {
    "sd1": UNET | CROSS,
    "sd1 inpainting": UNET | CROSS | {"in_channels": 9},
    "sd2": UNET | CROSS | WIDE,
    "sdxl": UNET
    | WIDE
    | {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2],
        "cross_attention_dim": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 16 + 6 * 256,
    },
}
DISTILLED = {  # each attention has its own depth, up and down differ, the middle is one block or none
    "ssd": UNETS["sdxl"]
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 1]],
        "reverse_transformer_layers_per_block": [[1, 1, 3], 1],
    },
    "vega": UNETS["sdxl"]
    | {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": [1, 1]}
    | {"reverse_transformer_layers_per_block": [2, 1]},
    "koala": UNETS["sdxl"] | {"layers_per_block": 1, "mid_block_type": None},
    "sd2 small": UNETS["sd2"] | {"layers_per_block": 1, "mid_block_type": None},
}
OF_FAMILY = dict.fromkeys(("ssd", "vega", "koala"), stable_diffusion_xl.FAMILY) | {
    "sd2 small": stable_diffusion_2.FAMILY,
    "sd1": stable_diffusion_1.FAMILY,
    "sd1 inpainting": stable_diffusion_1.FAMILY,
    "sd2": stable_diffusion_2.FAMILY,
    "sdxl": stable_diffusion_xl.FAMILY,
}
NORMAL, ZERO = schedules.scaled_linear(), schedules.zero_terminal_snr(schedules.scaled_linear())
EMPTY = np.zeros(0, np.float16)
AUTOENCODER = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
}
OUTSIDE = {  # of the U-Net's blocks
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
INSIDE = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
INSIDE |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}


def random_tensors(of, config):
    rng = np.random.default_rng(0)
    shapes = of(config, "test")[1]
    tensors = to_torch(jax.tree.map(lambda leaf: np.broadcast_to(0, leaf.shape), shapes))
    return {name: rng.normal(size=tensor.shape).astype(np.float16) for name, tensor in tensors.items()}


def ldm_unet_name(name, config):
    head, leaf = name.rsplit(".", 1)
    if head in OUTSIDE:
        return f"{OUTSIDE[head]}.{leaf}"
    part, rest = name.split(".", 1)
    step = config["layers_per_block"] + 1
    if part == "mid_block":
        kind, i, rest = rest.split(".", 2)
        where = f"middle_block.{1 if kind == 'attentions' else 2 * int(i)}"
    else:
        block, kind, layer, rest = rest.split(".", 3)
        block, layer = int(block), int(layer)
        attends = "Cross" in config["up_block_types"][block]
        where, rest = {
            "downsamplers": (f"input_blocks.{step * (block + 1)}.0.op", rest.removeprefix("conv.")),
            "upsamplers": (f"output_blocks.{step * (block + 1) - 1}.{2 if attends else 1}", rest),
        }.get(kind) or (
            f"{'input' if part == 'down_blocks' else 'output'}_blocks."
            f"{step * block + layer + (part == 'down_blocks')}.{int(kind == 'attentions')}",
            rest,
        )
        if kind.endswith("samplers"):
            return f"{where}.{rest}"
    first = rest.split(".")[0]
    return f"{where}.{rest.replace(first, INSIDE.get(first, first), 1)}"


def ldm_autoencoder_name(name):
    levels = len(AUTOENCODER["block_out_channels"])
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in {
        "down_blocks.": "down.",
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_out.0": "proj_out",
        "to_": "",
        "resnets": "block",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        name = name.replace(ours, theirs)
    return name


def ldm_autoencoder(tensors):
    """Under the original names, the maps of the attention as 1x1 convolutions."""
    return {
        "first_stage_model." + ldm_autoencoder_name(name): tensor[..., None, None]
        if ".attentions." in name and tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


def clip_tensors(width, layers, projection, vocabulary=24, positions=7):
    rng = np.random.default_rng(1)
    linear = {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    linear |= {f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    shapes = {
        "embeddings.token_embedding.weight": (vocabulary, width),
        "embeddings.position_embedding.weight": (positions, width),
        "final_layer_norm.weight": (width,),
        "final_layer_norm.bias": (width,),
    }
    for i in range(layers):
        for name, shape in linear.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{name}.{leaf}": (width,) for leaf in ("weight", "bias")}
    shapes = {f"text_model.{name}": shape for name, shape in shapes.items()}
    if projection:
        shapes["text_projection.weight"] = (width, width)
    return {name: rng.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}


def open_clip(tensors, prefix):
    """Under OpenCLIP's names: q, k and v in one tensor, the projection transposed."""
    named = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            whole = np.concatenate([tensors[name.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            name, tensor = name.replace("q_proj.", "in_proj_"), whole
        elif "k_proj" in name or "v_proj" in name:
            continue
        for ours, theirs in {
            "text_model.embeddings.token_embedding": "token_embedding",
            "text_model.embeddings.position_embedding.weight": "positional_embedding",
            "text_model.final_layer_norm": "ln_final",
            "text_model.encoder.layers": "transformer.resblocks",
            "layer_norm": "ln_",
            "fc1": "c_fc",
            "fc2": "c_proj",
            "self_attn": "attn",
        }.items():
            name = name.replace(ours, theirs)
        if name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        named[prefix + name] = tensor
    return named | {prefix + "logit_scale": np.float16([1])}


def text_parts(family):
    """(what the file holds, what each text encoder should become)."""
    if family.startswith("sd1"):
        clip = clip_tensors(64, 2, projection=False)
        held = {f"cond_stage_model.transformer.{name}": tensor for name, tensor in clip.items()}
        held["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(7)[None]
        return held, [clip]
    if family.startswith("sd2"):
        whole = clip_tensors(64, 3, projection=True)
        kept = {n: t for n, t in whole.items() if ".layers.2." not in n and n != "text_projection.weight"}
        return open_clip(whole, "cond_stage_model.model."), [kept]
    first, second = clip_tensors(64, 2, projection=False), clip_tensors(128, 3, projection=True)
    held = {f"conditioner.embedders.0.transformer.{name}": tensor for name, tensor in first.items()}
    return held | open_clip(second, "conditioner.embedders.1.model."), [first, second]


@functools.cache
def checkpoint(family):
    """(tensors of a whole checkpoint in one file, its parts as they were before)."""
    config = (UNETS | DISTILLED)[family]
    unet, autoencoder = random_tensors(unet_of, config), random_tensors(autoencoder_of, AUTOENCODER)
    text, encoders = text_parts(family)
    held = {"model.diffusion_model." + ldm_unet_name(name, config): tensor for name, tensor in unet.items()}
    held |= ldm_autoencoder(autoencoder) | text | {"alphas_cumprod": np.float32(schedules.scaled_linear().alphas_bar)}
    return held, [unet, autoencoder, *encoders]


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


@pytest.mark.parametrize("family", UNETS | DISTILLED)
def test_parts_come_back(family, tmp_path):
    held, originals = checkpoint(family)
    write_file(tmp_path / "model.safetensors", held)
    found, parts, *_ = read_checkpoint(tmp_path / "model.safetensors")
    assert found == OF_FAMILY[family]
    assert list(parts) == ["unet", "vae", "text_encoder", "text_encoder_2"][: len(originals)]
    for part, original in zip(parts.values(), originals, strict=True):
        assert_equal(part.tensors, original)
    unet, like = unet_of(parts["unet"].config, "test")
    from_torch(parts["unet"].tensors, "test", like)
    from_torch(parts["vae"].tensors, "test", autoencoder_of(parts["vae"].config, "test")[1])
    for field, value in (UNETS | DISTILLED)[family].items():
        if not field.startswith("_") and field != "transformer_layers_per_block":
            assert getattr(unet, field) == as_tuple(value), field
    assert parts["vae"].config["scaling_factor"] == (0.18215 if family.startswith(("sd1", "sd2")) else 0.13025)


def as_tuple(value):
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


@pytest.mark.parametrize("family", UNETS | DISTILLED)
def test_names_are_those_of_the_peer(family):
    pytest.importorskip("torch")
    peer = pytest.importorskip("diffusers.loaders.single_file_utils")
    held, originals = checkpoint(family)
    assert_equal(peer.convert_ldm_unet_checkpoint(dict(held), (UNETS | DISTILLED)[family]), originals[0])
    assert_equal(peer.convert_ldm_vae_checkpoint(dict(held), AUTOENCODER), originals[1])


def test_text_encoders_are_those_of_the_peer():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("diffusers.loaders.single_file_utils")
    whole = clip_tensors(64, 3, projection=True)
    held = {name: torch.tensor(t) for name, t in open_clip(whole, "conditioner.embedders.1.model.").items()}
    model = types.SimpleNamespace(config=types.SimpleNamespace(hidden_size=64))
    converted = peer.convert_open_clip_checkpoint(model, held, "conditioner.embedders.1.model.")
    assert_equal({name: tensor.numpy() for name, tensor in converted.items()}, whole)


PUBLISHED = {  # configs as published, the sizes of their networks in parameters
    "sd1": (
        {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        859_520_964,
    ),
    "sd2": (
        {
            "block_out_channels": [320, 640, 1280, 1280],
            "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        865_910_724,
    ),
    "sdxl": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        2_567_463_684,
    ),
    "ssd": (
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "mid_block_type": "UNetMidBlock2D",
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 4],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "sample_size": 128,
        },
        None,
    ),
    "refiner": (
        {
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "cross_attention_dim": 1280,
            "attention_head_dim": [6, 12, 24, 24],
            "transformer_layers_per_block": 4,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2560,
            "sample_size": 128,
        },
        None,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", PUBLISHED)
def test_published_networks_in_full_size(family, monkeypatch):
    """Shapes only: the number of parameters, the config inferred from one file, and diffusers' names and shapes."""
    config, parameters = (
        {"_class_name": "UNet2DConditionModel", "layers_per_block": 2} | PUBLISHED[family][0],
        PUBLISHED[family][1],
    )
    shapes = unet_of(config, "test")[1]
    tensors = to_torch(jax.tree.map(lambda leaf: np.broadcast_to(np.float16(0), leaf.shape), shapes))
    assert parameters in (None, sum(tensor.size for tensor in tensors.values()))

    held = {"model.diffusion_model." + ldm_unet_name(name, config): tensor for name, tensor in tensors.items()}
    held |= ldm_autoencoder(random_tensors(autoencoder_of, AUTOENCODER))
    monkeypatch.setattr(single_file, "read_file", lambda path, allow_pickle: held)
    found = read_checkpoint("x.ckpt").parts["unet"].config
    for field, value in config.items():
        every = [value] * len(found[field]) if isinstance(found[field], list) and isinstance(value, int) else value
        if field == "transformer_layers_per_block":  # entries of levels without transformers mean nothing
            every, found[field] = (
                [n for n, kind in zip(values, config["down_block_types"], strict=True) if "Cross" in kind]
                for values in (every, found[field])
            )
        assert found[field] == every, field

    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel.from_config(config).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }


def test_names_joined_by_underscores():
    """As in the LoRA files of SDXL."""
    assert unet_name("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 2) == (
        "down_blocks.1.attentions.0.transformer_blocks_0_attn1_to_q"
    )
    assert unet_name("output_blocks_2_0_skip_connection", 2) == "up_blocks.0.resnets.2.conv_shortcut"
    assert unet_name("output_blocks_2_2_conv", 2) == "up_blocks.0.upsamplers.0.conv"
    assert unet_name("input_blocks_10_0_emb_layers_1", 2) == "down_blocks.3.resnets.0.time_emb_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: {"other.weight": np.zeros(1)}, "expected a whole checkpoint of one of"),
        (
            lambda held: {n: t for n, t in held.items() if "op" not in n},
            "lacks or misshapes tensors of Stable Diffusion 1",
        ),
        (lambda held: {n: t for n, t in held.items() if "first_stage" not in n}, "lacks or misshapes tensors"),
        (lambda held: {n: t for n, t in held.items() if "middle_block.1" not in n}, "lacks or misshapes tensors"),
        (
            lambda held: held | {"edm_mean": np.zeros(4), "edm_std": np.ones(4)},
            ": edm_mean, edm_std would change",
        ),
        (lambda held: held | {"edm_vpred.sigma_max": np.ones(1)}, ": edm_vpred.sigma_max would change"),
        (lambda held: held | {"control_model.zero_convs.0.0.weight": np.zeros(1)}, ": control_model.zero"),
        (lambda held: held | {"alphas_cumprod": np.linspace(1, 0, 1000)}, "alphas_cumprod is the table of another"),
        (
            lambda held: held | {"ztsnr": EMPTY, "alphas_cumprod": np.linspace(1, 0, 1000)},
            "alphas_cumprod is the table of another",
        ),
        (lambda held: held | {"scale_factor": np.full(1, np.nan)}, "scale_factor is nan, expected a finite number"),
        (lambda held: held | {"scale_factor": np.zeros(0)}, "lacks or misshapes tensors"),
    ],
)
def test_what_is_no_checkpoint_is_one_line(change, message, tmp_path):
    write_file(tmp_path / "x.safetensors", change(checkpoint("sd1")[0]))
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint(tmp_path / "x.safetensors")
    assert "\n" not in str(raised.value)


def test_a_file_with_an_autoencoder_takes_no_other(tmp_path):
    write_file(tmp_path / "x.safetensors", checkpoint("sd1")[0])
    with pytest.raises(ValueError, match=r"vae='another' is for a file without an autoencoder, and .* has its own"):
        read_checkpoint(tmp_path / "x.safetensors", vae="another")


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "", "unet."])
def test_a_unet_alone(prefix, tmp_path):
    """In a file of ComfyUI, or by the names of diffusers."""
    held, originals = checkpoint("sd1")
    config, start = read_parts(held, tmp_path)["unet"].config, "model.diffusion_model."
    alone = {prefix + name.removeprefix(start): tensor for name, tensor in held.items() if name.startswith(start)}
    if prefix == "unet.":
        alone = {prefix + name: tensor for name, tensor in originals[0].items()}
    write_file(tmp_path / "x.safetensors", alone)
    found = read_denoiser(tmp_path / "x.safetensors", stable_diffusion_1.FAMILY, config, "config.json")
    assert found.config == config
    assert_equal(found.tensors, originals[0])


def read_parts(held, folder):
    write_file(folder / "whole.safetensors", held)
    return read_checkpoint(folder / "whole.safetensors").parts


def test_the_refiner_in_one_file(tmp_path):
    """Its only encoder is the second one of XL, at the place of the first."""
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    held = {name: tensor for name, tensor in checkpoint("sdxl")[0].items() if not name.startswith(first)}
    write_file(tmp_path / "x.safetensors", {name.replace(second, first): tensor for name, tensor in held.items()})
    read = read_checkpoint(tmp_path / "x.safetensors")
    assert read.family == stable_diffusion_xl.REFINER and set(read.parts) == {"unet", "vae", "text_encoder_2"}


def sigmas(schedule):
    level = schedule(np.arange(1000))
    return np.float32(level.sigma / np.maximum(level.alpha, 1e-4))


@pytest.mark.parametrize(
    ("family", "tensors", "header", "prediction", "schedule"),
    [
        ("sdxl", {}, {}, "eps", NORMAL),
        ("sdxl", {"v_pred": EMPTY}, {}, "v", NORMAL),
        ("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "v", ZERO),
        ("sd1", {"v_pred": EMPTY, "ztsnr": EMPTY}, {}, "v", ZERO),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v", NORMAL),
        ("sdxl", {}, {"modelspec.prediction_type": "epsilon", "modelspec.title": "any"}, "eps", NORMAL),
        ("sdxl", {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "v", NORMAL),
        ("sdxl", {}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, "v", ZERO),
        ("sdxl", {}, {"ss_v_parameterization": "False", "ss_zero_terminal_snr": "None"}, "eps", NORMAL),
        ("sd1", {}, {"modelspec.timestep_range": "0,1000", "modelspec.encoder_layer": "1"}, "eps", NORMAL),
        ("sdxl", {}, {"modelspec.timestep_range": "(0, 1000)"}, "eps", NORMAL),
        ("sdxl", {}, {"modelspec.timestep_range": "[1,1000]"}, "eps", NORMAL),
        ("sd2", {}, {"modelspec.prediction_type": "v"}, "v", NORMAL),
        ("sd2", {}, {"modelspec.predict_key": "v"}, "v", NORMAL),
        ("sdxl", {}, {"modelspec.predict_key": "epsilon"}, "eps", NORMAL),
        ("sdxl", {}, {"prediction_type": "v-prediction"}, "v", NORMAL),
        ("sd2", {}, {"modelspec.architecture": "Stable-Diffusion-V2-768-V"}, "v", NORMAL),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v", NORMAL),
        ("sd2", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "eps", NORMAL),
        ("sd1", {"alphas_cumprod": np.float16(ZERO.alphas_bar)}, {}, "eps", ZERO),
        ("sd1", {"alphas_cumprod": NORMAL.alphas_bar.astype(ml_dtypes.bfloat16)}, {}, "eps", NORMAL),
        ("sdxl", {"denoiser.sigmas": sigmas(NORMAL)}, {}, "eps", NORMAL),
        ("sdxl", {"model_ema.decay": np.ones(()), "betas": np.ones(1000)}, {}, "eps", NORMAL),
        ("sdxl", {"global_step": np.ones(()), "loss_fn.logvar": np.zeros(1)}, {"ss_clip_skip": "1"}, "eps", NORMAL),
        ("sd1", {"cond_stage_model.clip_l.text_projection": np.ones((2, 2))}, {}, "eps", NORMAL),
    ],
)
def test_what_a_file_states(family, tensors, header, prediction, schedule, tmp_path):
    """Empty marker tensors, tables of noise levels and the header say what is predicted on which schedule."""
    write_file(tmp_path / "x.safetensors", checkpoint(family)[0] | tensors, metadata=header)
    stated = read_checkpoint(tmp_path / "x.safetensors").scheduler
    found, predicted = schedule_of(stated, "test")
    assert predicted == prediction
    np.testing.assert_allclose(found.logsnr_table, schedule.logsnr_table)
    assert stated["timestep_spacing"] == ("trailing" if schedule is ZERO else "leading")


def test_another_layer_of_the_text_encoder_is_a_warning(caplog, tmp_path):
    for field, warned in (("modelspec.encoder_layer", True), ("ss_clip_skip", True), ("modelspec.title", False)):
        caplog.clear()
        write_file(tmp_path / "x.safetensors", checkpoint("sd1")[0], metadata={field: "2"})
        read_checkpoint(tmp_path / "x.safetensors")
        assert (f"{field}=2" in caplog.text) == ("set clip_skip to 1" in caplog.text) == warned


def test_a_table_of_an_xl_denoiser_has_zero_terminal_snr(tmp_path):
    held = {name: tensor for name, tensor in checkpoint("sdxl")[0].items() if name != "alphas_cumprod"}
    write_file(tmp_path / "x.safetensors", held | {"denoiser.sigmas": sigmas(ZERO)})
    assert read_checkpoint(tmp_path / "x.safetensors").scheduler["rescale_betas_zero_snr"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_text_encoders_of_newer_transformers(family, tmp_path):
    """Without the prefix text_model., and with a projection that is not used."""
    held, originals = checkpoint(family)
    prefix = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}[family]
    renamed = {name.replace(f"{prefix}text_model.", prefix): tensor for name, tensor in held.items()}
    assert renamed.keys() != held.keys()
    renamed[f"{prefix}text_projection.weight"] = np.zeros((64, 64), np.float16)
    write_file(tmp_path / "x.safetensors", renamed)
    part = read_checkpoint(tmp_path / "x.safetensors").parts["text_encoder"]
    assert_equal(part.tensors, originals[2])
    assert part.config["num_hidden_layers"] == 2


def test_the_factor_of_the_latents_in_a_file(tmp_path):
    write_file(tmp_path / "x.safetensors", checkpoint("sd1")[0] | {"scale_factor": np.float32(0.2)})
    assert read_checkpoint(tmp_path / "x.safetensors").parts["vae"].config["scaling_factor"] == np.float32(0.2)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"modelspec.prediction_type": "flow"}, "modelspec.prediction_type='flow' in its header is not supported"),
        ({"modelspec.timestep_range": "800,1000"}, "modelspec.timestep_range='800,1000' in its header is not"),
        ({"modelspec.timestep_range": "(0,200)"}, "modelspec.timestep_range='.0,200.' in its header is not"),
        ({"modelspec.predict_key": "edm"}, "modelspec.predict_key='edm' in its header is not supported"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-edm"}, "its header says that it is an EDM or a flow model"),
        ({"ss_flow_model": "True"}, "its header says that it is an EDM or a flow model"),
        ({"ss_zero_terminal_snr": "perhaps"}, "ss_zero_terminal_snr='perhaps' in its header is not supported"),
    ],
)
def test_statements_that_are_not_supported_are_refused_by_name(header, message, tmp_path):
    write_file(tmp_path / "x.safetensors", checkpoint("sd1")[0], metadata=header)
    with pytest.raises(ValueError, match=message) as raised:
        read_checkpoint(tmp_path / "x.safetensors")
    assert str(tmp_path) in str(raised.value)
