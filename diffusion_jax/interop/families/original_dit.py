"""The transformer of DiT and of SiT in one file, with the tensor names of their code.

facebookresearch/DiT and willisma/SiT have the same network, so their files look alike. DiT predicts eps and a variance
at a time step of 0 to 999, SiT the velocity x0 - eps at a time that is 0 for noise and 1 for data.
"""

import re

import numpy as np

from diffusion_jax.interop.family import Description, Tensors
from diffusion_jax.models.token_layers import WAVES, sincos_positions

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # width -> heads: S, B, L and XL
NAMES = (
    (r"^x_embedder\.proj\.", "pos_embed.proj."),
    (r"^t_embedder\.mlp\.0\.", "emb.timestep_embedder.linear_1."),
    (r"^t_embedder\.mlp\.2\.", "emb.timestep_embedder.linear_2."),
    (r"^y_embedder\.embedding_table\.", "emb.class_embedder.embedding_table."),
    (r"^final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"^final_layer\.linear\.", "proj_out_2."),
    (r"^blocks\.(\d+)\.", r"transformer_blocks.\1."),
    (r"\.adaLN_modulation\.1\.", ".norm1.linear."),
    (r"\.attn\.proj\.", ".attn1.to_out.0."),
    (r"\.mlp\.fc1\.", ".ff.net.0.proj."),
    (r"\.mlp\.fc2\.", ".ff.net.2."),
)


def read(tensors: Tensors) -> dict[str, Description] | None:
    """The transformer of DiT, None for another file. Raises ValueError for a width or positions that no DiT has."""
    if not {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight"} <= tensors.keys():
        return None
    width, channels, size, _ = tensors["x_embedder.proj.weight"].shape
    if width not in HEADS:
        raise ValueError(f"its width is {width}, expected one of {', '.join(map(str, HEADS))}")
    side = round(tensors["pos_embed"].shape[1] ** 0.5)
    if not np.allclose(tensors["pos_embed"][0], sincos_positions((side, side), width), atol=2e-3):
        raise ValueError("pos_embed has other positions than the sines and cosines of DiT")
    config = {
        "_class_name": "Transformer",
        "sample_size": side * size,
        "patch_size": size,
        "in_channels": channels,
        "out_channels": len(tensors["final_layer.linear.bias"]) // size**2,
        "num_layers": len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        "num_attention_heads": HEADS[width],
        "attention_head_dim": width // HEADS[width],
        "num_embeds_ada_norm": len(tensors["y_embedder.embedding_table.weight"]) - 1,
    }
    return {"transformer": Description(config, _renamed(tensors))}


def read_velocity(tensors: Tensors) -> dict[str, Description] | None:
    """The transformer of SiT, as one that predicts eps - x0 at the time 1 - t. Errors as of `read`."""
    parts = read(tensors)
    if parts is None:
        return None
    config, renamed = parts["transformer"]
    first = "emb.timestep_embedder.linear_1.weight"
    changed = {first: _of_reversed_time(renamed[first])}
    changed |= {name: -renamed[name] for name in ("proj_out_2.weight", "proj_out_2.bias")}
    return {"transformer": Description(config, renamed | changed)}


def _renamed(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors under our names, q, k and v apart, without the fixed positions."""
    renamed = {}
    for original, tensor in tensors.items():
        if original == "pos_embed":
            continue
        name = original
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            names = [name.replace(".attn.qkv.", f".attn1.to_{letter}.") for letter in "qkv"]
            renamed |= dict(zip(names, np.split(tensor, 3), strict=True))
        else:
            renamed[name] = tensor
    return renamed


def _of_reversed_time(weight: np.ndarray) -> np.ndarray:
    """The map of the waves of 1 - t, as a map of those of t: (out, [cos, sin]).

    cos((1 - t) w) = cos(w) cos(t w) + sin(w) sin(t w),   sin((1 - t) w) = sin(w) cos(t w) - cos(w) sin(t w)
    """
    w = 10000.0 ** -(np.arange(WAVES // 2) / (WAVES // 2))
    of_cos, of_sin = np.split(weight.astype(np.float64), 2, axis=1)
    turned = of_cos * np.cos(w) + of_sin * np.sin(w), of_cos * np.sin(w) - of_sin * np.cos(w)
    return np.concatenate(turned, axis=1).astype(weight.dtype)
