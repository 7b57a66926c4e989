"""Updates of published models in files of LoRA and its relatives, applied to their weights.

`weight_updates` has the formulas: LoRA, LoCon, DoRA, LoHa, LoKr. There are two naming schemes for the updated maps.
Kohya's and LyCORIS' files join the path with underscores, and use the path of the original code for SDXL, FLUX.2 and
Z-Image. Files of diffusers, peft, ComfyUI and OneTrainer (OMI) use dots, the last two with the path of the original
code, where one map may be several of ours (`originals`):

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight, ….lora_up.weight, ….alpha
    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight, ….lora_B.weight
    diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_A.weight, ….lora_B.weight
    unet.input_blocks.1.1.transformer_blocks.0.attn1.to_q.lora_down.weight, ….lora_up.weight, ….alpha
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight, ….lora_B.weight
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path as tree_leaves
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax.interop.adapter_config import Settings, read_settings
from diffusion_jax.interop.family import FileNames
from diffusion_jax.interop.names import kernel_from_torch, kernel_to_torch, torch_name
from diffusion_jax.interop.pipeline import PublishedPipeline
from diffusion_jax.interop.tensors import check_finite, read_file, write_file
from diffusion_jax.interop.weight_updates import KINDS, Update, kind_of, rank_of, updated
from diffusion_jax.models.stacking import layers, mapped
from diffusion_jax.paths import Path
from diffusion_jax.stored import Stored, on_host

_NAME = r"(?:\.[^.]+)?"  # peft's name of the adapter, such as "default", which diffusers leaves out
# What a tensor is, by the end of its name.
ROLES = {
    "lora_down": rf"(\.lora_down|\.lora_A{_NAME}|[._]lora\.down|\.lora_linear_layer\.down)\.weight",
    "lora_up": rf"(\.lora_up|\.lora_B{_NAME}|[._]lora\.up|\.lora_linear_layer\.up)\.weight",
    "lora_mid": r"\.lora_mid\.weight",
    **{
        factor: rf"\.{factor}{_NAME}" for kind in ("LoHa", "LoKr") for factor in sorted(KINDS[kind].names)
    },
    "alpha": r"\.alpha",
    "dora_scale": r"\.dora_scale",
    "lora_magnitude_vector": rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?",
}  # fmt: skip
# Kinds of updates in peft that are not supported. Their tensors are named by the kind, such as map.hra_u.
PEFT_KINDS = (
    *("AdaMSS", "BEFT", "BOFT", "Bone", "C3A", "DEFT", "DeLoRA", "FourierFT", "FRoD", "GLoRA", "GraLoRA", "HiRA"),
    *("HRA", "IA3", "Lily", "LN_tuning", "MiSS", "OFT", "OSF", "PEANuT", "Poly", "PSOFT", "PVeRA", "RandLoRA", "RoAd"),
    *("Shadow", "SHiRA", "SuperTuning", "TinyLoRA", "Trainable_tokens", "UniLoRA", "VBLoRA", "VeRA", "WaveFT", "XLoRA"),
)
# Tensors of files that look alike and that are not supported, by a part of their names.
OTHERS = {
    r"^bundle_emb\.": "learned words (textual inversion) bundled with a LoRA, which are read from files of their own "
    "(embeddings, add_embeddings)",
    r"^(emb_params|clip_[lg]|text_encoders_[01]|string_to_param.*)$": "learned words (textual inversion), which are "
    "not LoRAs (embeddings, add_embeddings)",
    r"\.(diff|diff_b|set_weight)$": "full differences of weights (LyCORIS' Full)",
    r"\.[wb]_norm$": "updates of norms (LyCORIS' Norm)",
    **{rf"(^|\.){kind.lower()}_": f"updates of {kind} (peft)" for kind in PEFT_KINDS},
    r"(^|\.)(prompt_embeddings|adaption_(prompt|gate))$": "prompt tuning (peft)",
    r"\.[ab][12]\.weight$|\.bm[12]\.weight$": "updates of GLoRA",
    r"\.on_input$": "scales of activations (IA3)",
    r"\.lora_embedding_[AB]": "low-rank updates of an embedding",
    r"\.lora_E": "updates of AdaLoRA",
    r"\.(lora_[AB]|lora_up|lora_down).*\.bias$": "a LoRA with biases (lora_bias)",
    r"\.scalar$": "a LyCORIS with trained scalars (use_scalar)",
    r"\.modules_to_save\.|\.original_module\.": "whole layers of peft's modules_to_save",
    r"\.reshape_weight$": "a LoRA of maps of another shape",
    r"^(lora_)?control(net|_model)": "a Control-LoRA",
    r"_custom_diffusion\.": "Custom Diffusion",
    r"^(ip_adapter|image_proj)\.": "an IP-Adapter",
}


def load_lora(
    path: str | Path, pipeline: PublishedPipeline | None = None, allow_pickle: bool = False, denoiser: str = "unet"
) -> dict[str, dict[str, Update]]:
    """The updates of a file by part, such as "unet" and "text_encoder", and map.

    A map is named by its path joined with underscores, because the names in every file can be converted to that.
    pipeline: its family says how names in the file are read. None for a model trained with this library.
    allow_pickle: see `read_file`.
    denoiser: without a pipeline, the name of the denoiser (`denoisers.name_of`).
    Raises ValueError for tensors of another kind or with values that are not finite, for incomplete updates and for
    settings that are not supported.
    """
    roles_by_place: dict[tuple[str, str], dict] = {}
    maps = {}  # place -> path with dots, where the file has dots, and its rows in the map of the file
    settings = read_settings(path, pipeline.family.denoiser if pipeline else denoiser)
    tensors = read_file(path, allow_pickle)
    if not tensors:
        raise ValueError(f"{path}: expected the updates of a LoRA, got a file without tensors")
    _refuse_others(path, tensors)
    for name, tensor in tensors.items():
        check_finite(name, tensor, path)
        head, role = _role(path, name)
        try:
            part, places = _places(head, pipeline, denoiser)
        except ValueError as error:
            raise ValueError(f"{path}: {name} {error}") from None
        for target, rows in places.items():
            place = part, target.replace(".", "_")
            roles = roles_by_place.setdefault(place, {})
            if role in roles:
                raise ValueError(f"{path}: {part} {target} has two tensors of {role}, such as those of two adapters")
            roles[role], maps[place] = tensor, (target, rows)
    parts: dict[str, dict[str, Update]] = {}
    for (part, target), roles in roles_by_place.items():
        name, rows = maps[part, target]
        try:
            update = _update(roles, name, settings.get(part))._replace(rows=rows)
        except ValueError as error:
            raise ValueError(f"{path}: {part} {target} {error}") from None
        parts.setdefault(part, {})[target] = update
    return parts


def save_lora(
    path: str | Path, updates: PyTree, scale: float, dtype: DTypeLike = np.float32, part: str = "unet"
) -> None:
    """Write updates of a denoiser, as `models.lora` trains them, to a .safetensors file in the layout of peft.

    scale: alpha / rank. `up` is multiplied by it, so that readers see an alpha equal to the rank.
    part: name of the denoiser in the published pipeline, or by `denoisers.name_of`.
    """
    tensors = {}
    arrays = ((tuple(key.key for key in keys), np.asarray(leaf, np.float32)) for keys, leaf in tree_leaves(updates))
    leaves = {path: leaf for array in arrays for path, leaf in layers(*array)}
    for (*module, half), leaf in leaves.items():
        name = f"{part}." + torch_name((*module, "kernel")).removesuffix(".weight")
        letter, factor = {"down": ("A", 1.0), "up": ("B", scale)}[half]
        tensor = leaf.transpose(leaf.ndim - 1, leaf.ndim - 2, *range(leaf.ndim - 2))
        if half == "up" and leaves[(*module, "down")].ndim > 2:
            tensor = tensor[..., None, None]  # a 1x1 convolution
        tensors[f"{name}.lora_{letter}.weight"] = factor * tensor
    write_file(path, tensors, dtype)


def merge_lora(
    pipeline: PublishedPipeline, path: str | Path, scale: float = 1.0, allow_pickle: bool = False
) -> PublishedPipeline:
    """The pipeline with the updates of a file in its weights.

    scale: factor of the updates. -1 removes those of scale 1 again, except of DoRA, which also sets lengths.
    allow_pickle: see `read_file`.
    Raises ValueError for updates of unknown maps or of another shape, and the errors of `load_lora`.
    """
    updates = load_lora(path, pipeline, allow_pickle)
    unknown = updates.keys() - pipeline.parts.keys()
    if unknown:
        raise ValueError(f"{path} updates {', '.join(sorted(unknown))}, which this pipeline does not have")
    parts = {
        name: part._replace(params=merge(part.params, updates.get(name, {}), scale, f"{path}, {name}"))
        for name, part in pipeline.parts.items()
    }
    return pipeline._replace(parts=parts)


def merge(params: PyTree, updates: Mapping[str, Update], scale: float, source: str) -> PyTree:
    """Apply updates, named as by `load_lora`, to the kernels of Flax variables.

    source: the file, for messages.
    """

    def name_of(path):
        return torch_name(path).removesuffix(".weight").replace(".", "_") if path[-1] == "kernel" else ""

    def names_in(path, leaf):
        return {name_of(layer) for layer, _ in layers(path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))}

    def merged(path, leaf):
        target = name_of(path)
        if target not in updates:
            return leaf
        weight = kernel_to_torch(path, leaf.astype(np.float32))
        try:
            weight = updated(weight, updates[target], scale)
        except ValueError as error:
            raise ValueError(f"{source}: the update of {target} {error}") from None
        return kernel_from_torch(path, weight).astype(leaf.dtype)

    def with_updates(keys, leaf):
        path = tuple(key.key for key in keys[1:])
        if updates.keys().isdisjoint(names_in(path, leaf)):
            return leaf
        array = mapped(merged, path, np.asarray(leaf))
        return on_host(array) if isinstance(leaf, Stored) else jnp.asarray(array)

    known = (names_in(tuple(key.key for key in keys[1:]), leaf) for keys, leaf in tree_leaves(params))
    unknown = updates.keys() - set().union(*known)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} updates of maps that the network does not have, such as {min(unknown)}; "
            "it was made for another model, or names the maps in an unknown way"
        )
    return jax.tree_util.tree_map_with_path(with_updates, params)


def _refuse_others(path, tensors):
    for pattern, kind in OTHERS.items():
        name = next((name for name in tensors if re.search(pattern, name)), None)
        if name:
            raise ValueError(f"{path}: {name} belongs to {kind}; supported are LoRA, LoCon, DoRA, LoHa and LoKr")


def _role(path, name):
    """(name of the map, role) of a tensor."""
    for role, pattern in ROLES.items():
        match = re.fullmatch(f"(.+?)(?:{pattern})", name)
        if match:
            return match[1], role
    raise ValueError(
        f"{path}: {name} is not a tensor of a LoRA, LoHa or LoKr; expected names that end in .lora_down.weight, "
        ".lora_A.weight, .hada_w1_a, .lokr_w1, .alpha or the like"
    )


def _update(roles: dict, name: str, settings: Settings | None) -> Update:
    """The update of one map. name: its path with dots, for the patterns of the settings."""
    roles = dict(roles)
    alpha, magnitude = roles.pop("alpha", None), roles.pop("dora_scale", None)
    if "lora_magnitude_vector" in roles:  # one number for each output, of convolutions in the shape (1, out, 1, 1)
        magnitude = roles.pop("lora_magnitude_vector").reshape(-1)
    kind = kind_of(roles)
    rank, rank_stabilized = rank_of(kind, roles), False
    if alpha is not None:
        alpha = _number(alpha)
    if settings:
        alpha_of_settings, rank_of_settings = settings.of(name)
        alpha, rank = alpha_of_settings if alpha is None else alpha, rank or rank_of_settings
        rank_stabilized = settings.rank_stabilized
        if settings.is_dora not in (None, magnitude is not None):
            found = "no magnitude" if magnitude is None else "a magnitude"
            raise ValueError(f"has {found}, but the setting use_dora of the file is {settings.is_dora}")
    return Update(kind, roles, alpha, rank, rank_stabilized, magnitude)


def _number(alpha):
    if alpha.size != 1:
        raise ValueError(f"has an alpha of shape {alpha.shape}; expected one number")
    return float(alpha.reshape(()))


def _places(name, pipeline, denoiser):
    """(part, our maps with their rows) of the map `name` in a file; the paths have dots if the name has."""
    parts, names = {denoiser: None}, FileNames()
    if pipeline is not None:
        parts, denoiser, names = pipeline.family.parts, pipeline.family.denoiser, pipeline.family.names
    name = re.sub(r"base_model\.model\.|\.processor", "", name)
    begins = {f"{prefix}_": part for prefix, part in names.prefixes.items()}
    begins |= {f"{prefix}.": part for prefix, part in names.dotted.items()}
    begins |= {f"{part}.": part for part in (*names.prefixes.values(), *parts)}
    begin = max(filter(name.startswith, begins), key=len, default="")
    part, path = begins.get(begin, denoiser), name.removeprefix(begin)
    places = names.places(part, path, pipeline and pipeline.denoiser.module)
    qualified = parts[part].qualified if parts.get(part) else str
    return part, {qualified(place): rows for place, rows in places.items()}
