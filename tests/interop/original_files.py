"""Files of a denoiser and of LoRAs as other programs write them, with the names of its original code."""

import json

import numpy as np
import pytest

from diffusion_jax.interop.folders import transformer_of
from diffusion_jax.interop.names import from_torch, to_torch
from diffusion_jax.interop.pipeline import Part
from diffusion_jax.interop.single_file import read_denoiser
from diffusion_jax.interop.tensors import read_json

RANK = 3


def write(path, tensors, metadata=None):
    """As other programs write them: by safetensors of torch."""
    import torch
    from safetensors.torch import save_file

    tensors = {
        name: tensor if isinstance(tensor, torch.Tensor) else torch.tensor(np.array(tensor))
        for name, tensor in tensors.items()
    }
    save_file(tensors, path, metadata)
    return path


def read(family, folder, file):
    """The transformer of a file for a pipeline's folder, as `load_pipeline` reads it beside the other parts."""
    source = folder / "transformer" / "config.json"
    config, tensors = read_denoiser(file, family, read_json(source), source)
    module, like = transformer_of(config, file)
    return Part(module, from_torch(tensors, str(file), like))


def weights(part):
    return {name: np.asarray(tensor) for name, tensor in to_torch(part.params).items()}


def assert_equal(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(ours[name], tensor, err_msg=name, **tolerance or {"rtol": 0})


def quantized(tensors, kind, style, prefix, layers):
    """(file, its header, expected weights in the original layout): scaled by the largest weight, as ComfyUI does it.

    Whole maps by one number; in the style "rows", each row. layers: ends of the names of those that are scaled.
    """
    torch = pytest.importorskip("torch")
    dtype, held, expected, formats = getattr(torch, kind), {}, {}, {}
    for name, tensor in tensors.items():
        layer, tensor = name.removesuffix(".weight"), torch.tensor(tensor)
        if not layer.endswith(layers) or style == "bfloat16":
            held[prefix + name] = tensor.to(torch.bfloat16)
            expected[name] = held[prefix + name].float().numpy()
            continue
        largest = tensor.abs().amax(dim=1, keepdim=True) if style == "rows" else tensor.abs().max()
        scale = largest / torch.finfo(dtype).max if style != "cast" else torch.tensor(1.0)
        weight = (tensor / scale).to(dtype)
        held[f"{prefix}{layer}.weight"], expected[name] = weight, (weight.float() * scale).numpy()
        assert (np.abs(expected[name] - tensor.numpy()).max() > 0) and np.allclose(expected[name], tensor, atol=0.3)
        if style == "old":
            held[f"{prefix}{layer}.scale_weight"], held[f"{prefix}{layer}.scale_input"] = scale, torch.ones(1)
        elif style != "cast":
            held[f"{prefix}{layer}.weight_scale"], held[f"{prefix}{layer}.input_scale"] = scale, torch.tensor(0.5)
            formats[prefix + layer] = {"format": kind}
        if style == "bytes":
            held[f"{prefix}{layer}.weight"] = weight.view(torch.uint8)
    if style == "old":
        held[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=dtype)
    if style in ("rows", "bytes"):
        for layer, settings in formats.items():
            text = json.dumps({**settings, "full_precision_matrix_mult": True}).encode()
            held[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)
        return held, None, expected
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})}
    return held, header if style == "header" else None, expected


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def kohya(name):
    return f"lora_unet_{name.replace('.', '_')}.lora_down.weight", f"lora_unet_{name.replace('.', '_')}.lora_up.weight"


SPELLINGS = {
    "kohya": kohya,
    "original": lambda name: [f"diffusion_model.{name}.lora_{half}.weight" for half in "AB"],
    "peft": lambda name: [f"base_model.model.{name}.lora_{half}.weight" for half in "AB"],
    "ComfyUI": lambda name: [f"model.diffusion_model.{name}.lora_{half}.weight" for half in ("down", "up")],
}


def of_each_map(maps, original, names, alpha=None):
    """The tensors of a LoRA, and the changes of the weights in the original layout."""
    held, changes = {}, {}
    for seed, name in enumerate(maps):
        weight = original[f"{name}.weight"]
        down, up = numbers(seed, RANK, weight.shape[1]), numbers(100 + seed, len(weight), RANK)
        held |= dict(zip(names(name), (down, up), strict=True))
        changes[name] = (1 if alpha is None else alpha / RANK) * up @ down
        if alpha is not None:
            held[names(name)[0][: names(name)[0].index(".lora_")] + ".alpha"] = np.float32(alpha)
    return held, changes
