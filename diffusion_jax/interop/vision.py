"""Image encoders in the folder format of transformers: `config.json` beside `model.safetensors`."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from diffusion_jax import paths
from diffusion_jax.interop.folders import module_and_shapes, read_config
from diffusion_jax.interop.names import from_torch
from diffusion_jax.interop.tensors import read_json, read_tensors
from diffusion_jax.models.vision.vision import ImageEncoder
from diffusion_jax.paths import Path

WEIGHTS = "model"
CLIP, DINO, SAFETY = "CLIPVisionModelWithProjection", "Dinov2Model", "StableDiffusionSafetyChecker"
SIDE = 224  # pixels at which the features of DINOv2 are usually compared
USUAL_STATISTICS = {  # mean and deviation of pixels in [0, 1]
    "CLIP": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "DINOv2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
DINO_NAMES = (  # pattern of a name in DINOv2 -> the name in CLIP; both have the same network
    (r"^embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$", "vision_model.embeddings.position_embedding.weight"),
    (r"^embeddings\.patch_embeddings\.projection", "vision_model.embeddings.patch_embedding"),
    (r"^encoder\.layer\.", "vision_model.encoder.layers."),
    (r"^layernorm", "vision_model.post_layernorm"),
    (r"\.attention\.attention\.(query|key|value)", lambda match: f".self_attn.{match[1][0]}_proj"),
    (r"\.attention\.output\.dense", ".self_attn.out_proj"),
    (r"\.norm([12])\.", r".layer_norm\1."),
)


class LoadedEncoder(NamedTuple):
    """An image encoder. Run it by `encoder.apply(params, (pixels - mean) / deviation)` with pixels in [0, 1].

    name: "CLIP" or "DINOv2".
    reads_text: whether the folder has a whole CLIP model, whose text encoder `load_text_encoder` loads.
    """

    name: str
    encoder: ImageEncoder
    params: PyTree
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    reads_text: bool


def load_image_encoder(folder: str | Path, allow_pickle: bool = False) -> LoadedEncoder:
    """The image encoder of a folder, with the mean and deviation of its preprocessor_config.json, or the usual ones
    without that file.

    folder: of a CLIP model with its projection (also in a whole CLIP model or a safety checker), or of DINOv2, which is
      set to images of 224 pixels.
    allow_pickle: see `read_tensors`.
    Raises FileNotFoundError for a missing file and ValueError for an unsupported config or weights that do not fit.
    """
    config, source = read_config(folder)
    (name, *_) = np.ravel(config.get("architectures") or None).tolist()
    if name not in (CLIP, "CLIPModel", SAFETY, DINO):
        raise ValueError(f"{source}: expected the architecture of an image encoder, {CLIP} or {DINO}; got {name}")
    tensors, file = read_tensors(folder, WEIGHTS, allow_pickle)
    if name == DINO:
        fields, tensors = _dino(config, tensors, source)
    else:
        projection = {"projection_dim": config.get("projection_dim", 512)}
        config = config.get("vision_config", config)
        clip_fields = {field: config[field] for field in ImageEncoder.__dataclass_fields__ if field in config}
        fields = clip_fields | projection
        heads = ("vision_model.", "visual_projection.")
        tensors = {
            name.removeprefix("vision_model." if name.startswith("vision_model.vision_model.") else ""): tensor
            for name, tensor in tensors.items()
            if name.startswith(heads) and not name.endswith(".position_ids")
        }
    encoder, like = module_and_shapes(ImageEncoder, fields, source)
    family = "DINOv2" if name == DINO else "CLIP"
    preprocessor = paths.at(folder) / "preprocessor_config.json"
    preprocessing = read_json(preprocessor) if preprocessor.exists() else {}
    mean, deviation = (
        tuple(preprocessing.get(field, usual))
        for field, usual in zip(("image_mean", "image_std"), USUAL_STATISTICS[family], strict=True)
    )
    return LoadedEncoder(family, encoder, from_torch(tensors, file, like), mean, deviation, name == "CLIPModel")


def _dino(config: Mapping, tensors: Mapping[str, np.ndarray], source: str | Path) -> tuple[dict, dict]:
    """The fields and tensors of DINOv2, converted to CLIP's network. The scales of its branches are multiplied into the
    linear map before them, and the positions are resized to the usual image size.
    """
    if config.get("use_swiglu_ffn") or not config.get("qkv_bias", True):
        raise ValueError(f"{source}: use_swiglu_ffn and qkv_bias=false are not supported")
    width, patch = config.get("hidden_size", 768), config.get("patch_size", 14)
    fields = {
        "hidden_size": width,
        "intermediate_size": width * config.get("mlp_ratio", 4),
        "projection_dim": None,
        "num_hidden_layers": config.get("num_hidden_layers", 12),
        "num_attention_heads": config.get("num_attention_heads", 12),
        "image_size": SIDE,
        "patch_size": patch,
        "hidden_act": config.get("hidden_act", "gelu"),
        "layer_norm_eps": config.get("layer_norm_eps", 1e-6),
        "pre_norm": False,
        "patch_bias": True,
    }
    scales = {name: tensor for name, tensor in tensors.items() if ".layer_scale" in name}
    renamed = {}
    for name, tensor in tensors.items():
        if name in scales or name == "embeddings.mask_token":
            continue
        scale = None
        for pattern, branch in ((r"(.*)\.attention\.output\.dense", 1), (r"(.*)\.mlp\.fc2", 2)):
            if match := re.match(pattern, name):
                scale = scales[f"{match[1]}.layer_scale{branch}.lambda1"]
        tensor = tensor if scale is None else (tensor.T * scale).T
        for pattern, replacement in DINO_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    first, positions = "vision_model.embeddings.class_embedding", "vision_model.embeddings.position_embedding.weight"
    renamed[first] = renamed[first].reshape(-1)
    renamed[positions] = _resized(np.asarray(renamed[positions][0], np.float32), SIDE // patch)
    return fields, renamed


def _resized(positions: np.ndarray, side: int) -> np.ndarray:
    """Positions (1 + n · n, D) of the class token and a square of patches for a square of side · side patches."""
    old_side = round((len(positions) - 1) ** 0.5)
    weights = _bicubic(old_side, side)
    square = np.einsum("yh,xw,hwd->yxd", weights, weights, positions[1:].reshape(old_side, old_side, -1))
    return np.concatenate([positions[:1], square.reshape(side * side, -1)]).astype(np.float32)


def _bicubic(old_side: int, new_side: int) -> np.ndarray:
    """(new, old): weights of cubic convolution (Keys 1981) with a = -0.75, as torch interpolates."""
    weights, a = np.zeros((new_side, old_side)), -0.75
    for i in range(new_side):
        place = (i + 0.5) * old_side / new_side - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            apart = abs(place - j)
            near = (a + 2) * apart**3 - (a + 3) * apart**2 + 1
            far = a * (apart**3 - 5 * apart**2 + 8 * apart - 4)
            weights[i, np.clip(j, 0, old_side - 1)] += near if apart <= 1 else far
    return weights
