"""Models in the folder format of diffusers: `config.json` beside `diffusion_pytorch_model.safetensors`."""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from diffusion_jax import paths
from diffusion_jax.interop.names import from_torch, modern, to_torch
from diffusion_jax.interop.quantized import Tensor
from diffusion_jax.interop.tensors import read_json, read_tensors, write_file, write_json
from diffusion_jax.messages import first_line
from diffusion_jax.models.applied import shapes_of
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.flux2 import Flux2Transformer
from diffusion_jax.models.transformer import Transformer
from diffusion_jax.models.unet import UNet
from diffusion_jax.models.unet_fields import BLOCK_TYPES
from diffusion_jax.models.z_image import ZImageTransformer
from diffusion_jax.paths import Path

WEIGHTS = "diffusion_pytorch_model"
# fields of our networks that say how to run them, not what they are
RUNTIME_FIELDS = {"parent", "name", "dtype", "remat", "scan", "attention_implementation", "time_smoothing"}

# Default values in diffusers of fields missing in config.json, where our defaults differ.
DEFAULTS = {
    "UNet2DConditionModel": {},
    "UNet2DModel": dict(
        in_channels=3,
        out_channels=3,
        block_out_channels=(224, 448, 672, 896),
        mid_block_type="UNetMidBlock2D",
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
    ),
    "AutoencoderKL": dict(block_out_channels=(64,), layers_per_block=1, sample_size=32),
    "AutoencoderKLFlux2": dict(latent_channels=32, sample_size=1024, patch_size=(2, 2)),
    "DiTTransformer2DModel": dict(
        sample_size=32, num_embeds_ada_norm=1000, norm_eps=1e-5, modulation="own", freq_shift=1
    ),
    "Transformer": {},
    "Flux2Transformer2DModel": dict(
        num_layers=8, num_single_layers=48, num_attention_heads=48, joint_attention_dim=15360, guidance_embeds=True
    ),
    "ZImageTransformer2DModel": dict(axes_lens=(1024, 512, 512)),
}
# Fields that exist in only one of the two classes of diffusers, left out when saving the other.
FOREIGN = {
    "UNet2DConditionModel": {"add_attention", "attn_norm_num_groups"},
    "UNet2DModel": {
        "cross_attention_dim",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "only_cross_attention",
        "use_linear_projection",
        "upcast_attention",
        "addition_embed_type",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "time_cond_proj_dim",
    },
    "AutoencoderKL": {"patch_size", "batch_norm_eps", "decoder_block_out_channels"},
    "AutoencoderKLFlux2": {"scaling_factor", "shift_factor"},
    "DiTTransformer2DModel": {
        "mlp_ratio",
        "modulation",
        "norm",
        "qk_norm",
        "positions",
        "axes_dims_rope",
        "rope_theta",
        "rope_pairs",
        "text",
        "cross_attention_dim",
        "freq_shift",
        "time_cond_proj_dim",
        "target_embedding",
        "interval_embedding",
    },
    "Transformer": set(),
    "Flux2Transformer2DModel": {"sample_size"},
    "ZImageTransformer2DModel": {"sample_size"},
}
# Fields of diffusers that our networks lack: only one value is supported, or the field changes nothing here.
FIXED = {
    "act_fn": ("silu", "swish"),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "mid_block_scale_factor": (1,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "norm_type": ("ada_norm_zero",),
}
NO_EFFECT = {
    *("addition_embed_type_num_heads", "num_train_timesteps", "norm_num_groups", "upcast_attention"),
    *("batch_norm_momentum", "scaling_factor", "shift_factor", "n_kv_heads"),
}
DIT = ("DiTTransformer2DModel", "Transformer2DModel")  # the second is its name in the published config.json
TRANSFORMERS = {
    **dict.fromkeys((*DIT, "Transformer"), Transformer),
    "Flux2Transformer2DModel": Flux2Transformer,
    "ZImageTransformer2DModel": ZImageTransformer,
}
AnyTransformer = Transformer | Flux2Transformer | ZImageTransformer
AUTOENCODERS = ("AutoencoderKL", "AutoencoderKLFlux2")
COUNTER = "bn.num_batches_tracked"  # of torch's batch norm, in files of AutoencoderKLFlux2


def load_unet(folder: str | Path, dtype: DTypeLike = jnp.float32, allow_pickle: bool = False) -> tuple[UNet, PyTree]:
    """The U-Net of a folder and its variables. Run it by `unet.apply(variables, x, t, …)`.

    dtype: of the variables.
    allow_pickle: see `read_tensors`.
    For another compute type or remat, `unet.clone(dtype=jnp.bfloat16, remat=True)` uses the same variables.
    Raises FileNotFoundError for a missing file and ValueError for an unsupported config or weights that do not fit.
    """
    unet, like = unet_of(*read_config(folder))
    return unet, from_torch(*read_tensors(folder, WEIGHTS, allow_pickle), like, dtype)


def load_transformer(
    folder: str | Path, dtype: DTypeLike = jnp.float32, allow_pickle: bool = False, scan: bool = False
) -> tuple[AnyTransformer, PyTree]:
    """The transformer of a folder and its variables. Arguments as in `load_unet`.

    scan: compile one block for all, see `Transformer`.
    """
    transformer, like = transformer_of(*read_config(folder), scan)
    tensors, source = read_tensors(folder, WEIGHTS, allow_pickle)
    return transformer, from_torch(transformer_tensors(tensors), source, like, dtype)


def transformer_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the table of fixed positions, which some files of DiT have."""
    return {name: tensor for name, tensor in tensors.items() if name != "pos_embed.pos_embed"}


def load_autoencoder(
    folder: str | Path, dtype: DTypeLike = jnp.float32, allow_pickle: bool = False
) -> tuple[AutoencoderKL, PyTree]:
    """The autoencoder of a folder and its variables. Arguments as in `load_unet`."""
    autoencoder, like = autoencoder_of(*read_config(folder))
    tensors, source = read_tensors(folder, WEIGHTS, allow_pickle)
    return autoencoder, from_torch(autoencoder_tensors(tensors), source, like, dtype)


def autoencoder_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors with current names, without the counter of a batch norm."""
    return modern({name: tensor for name, tensor in tensors.items() if name != COUNTER})


def unet_of(config: Mapping, source: str | Path) -> tuple[UNet, PyTree]:
    """The U-Net that a config.json describes, and the shapes of its variables.

    config: content of the config.json.
    source: its path, for messages.
    """
    name = config.get("_class_name")
    if name not in ("UNet2DConditionModel", "UNet2DModel"):
        raise ValueError(f"{source}: expected a UNet2DConditionModel or UNet2DModel, got {name}")
    fields = _fields(UNet, config, source)
    alone = name == "UNet2DConditionModel" and config.get("mid_block_type") == "UNetMidBlock2D"
    if alone and unet_class(UNet(**fields)) != name:
        raise ValueError(
            f"{source}: without blocks that read text, mid_block_type 'UNetMidBlock2D' is supported only in UNet2DModel"
        )
    return module_and_shapes(UNet, fields, source)


def transformer_of(config: Mapping, source: str | Path, scan: bool = False) -> tuple[AnyTransformer, PyTree]:
    """The transformer that a config.json describes, and the shapes of its variables. Arguments as in `unet_of`.

    scan: compile one block for all, see `Transformer`.
    """
    name = config.get("_class_name")
    if name not in TRANSFORMERS:
        raise ValueError(f"{source}: expected one of {', '.join(TRANSFORMERS)}, got {name}")
    if name in DIT:
        config = {**config, "_class_name": DIT[0]}
    fields = _fields(TRANSFORMERS[name], config, source)
    if name in DIT and transformer_class(Transformer(**fields)) != DIT[0]:
        raise ValueError(f"{source}: a {DIT[0]} has classes, and norms without learned scales")
    return module_and_shapes(TRANSFORMERS[name], fields | {"scan": scan}, source)


def autoencoder_of(config: Mapping, source: str | Path) -> tuple[AutoencoderKL, PyTree]:
    """The autoencoder that a config.json describes, and the shapes of its variables. Arguments as in `unet_of`."""
    name = config.get("_class_name")
    if name not in AUTOENCODERS:
        raise ValueError(f"{source}: expected an {' or '.join(AUTOENCODERS)}, got {name}")
    levels = np.size((DEFAULTS[name] | config).get("block_out_channels", AutoencoderKL.block_out_channels))
    types = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for field, block_type in types.items():
        if list(np.ravel(config.get(field, (block_type,) * levels))) != [block_type] * levels:
            raise ValueError(
                f"{source}: {field} must be {levels} times {block_type!r}, once for each of block_out_channels"
            )
    config = {name: value for name, value in config.items() if name not in types}
    fields = _fields(AutoencoderKL, config, source)
    if name == "AutoencoderKLFlux2" and not fields["patch_size"]:
        raise ValueError(f"{source}: patch_size: expected height and width of a patch, got {fields['patch_size']!r}")
    for field, is_optional in (("scaling_factor", False), ("shift_factor", True), ("batch_norm_eps", False)):
        value = fields.get(field, 1.0)
        if not (is_optional and value is None) and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"{source}: {field}: expected a finite number, got {value!r}")
    return module_and_shapes(AutoencoderKL, fields, source)


def save_unet(unet: UNet, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32) -> None:
    """Write a folder that `load_unet` and diffusers read. dtype: of the stored tensors."""
    _save(unet_class(unet), unet, {}, variables, folder, dtype)


def unet_class(unet: UNet) -> str:
    """The name of the U-Net's class in diffusers."""
    cross = any(BLOCK_TYPES[name] == "cross" for name in (*unet.down_block_types, *unet.up_block_types)) or (
        unet.mid_block_type == "UNetMidBlock2DCrossAttn"
    )
    return "UNet2DConditionModel" if cross else "UNet2DModel"


def save_transformer(
    transformer: AnyTransformer, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32
) -> None:
    """Write a folder that `load_transformer` reads, and diffusers if it has this network. dtype: of the tensors."""
    _save(transformer_class(transformer), transformer, {}, variables, folder, dtype)


def transformer_class(transformer: AnyTransformer) -> str:
    """The name of the transformer's class in diffusers, or Transformer if it has none."""
    if not isinstance(transformer, Transformer):
        return next(name for name, module in TRANSFORMERS.items() if isinstance(transformer, module))
    defaults = {field.name: field.default for field in dataclasses.fields(Transformer)} | DEFAULTS[DIT[0]]
    is_dit = all(getattr(transformer, name) == defaults[name] for name in FOREIGN[DIT[0]])
    has_more = transformer.norm_elementwise_affine or transformer.num_embeds_ada_norm is None
    return DIT[0] if is_dit and not has_more else "Transformer"


def save_autoencoder(
    autoencoder: AutoencoderKL, variables: PyTree, folder: str | Path, dtype: DTypeLike = jnp.float32
) -> None:
    """Write a folder that `load_autoencoder` and diffusers read. dtype: of the stored tensors."""
    levels = len(autoencoder.block_out_channels)
    types = dict(down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels)
    counter = {COUNTER: np.zeros((), np.int64)} if autoencoder.patch_size else {}
    _save(autoencoder_class(autoencoder), autoencoder, types, variables, folder, dtype, counter)


def autoencoder_class(autoencoder: AutoencoderKL) -> str:
    """The name of the autoencoder's class in diffusers."""
    return AUTOENCODERS[1 if autoencoder.patch_size else 0]


def read_config(folder: str | Path) -> tuple[dict, Path]:
    """The content of a folder's config.json and its path."""
    path = paths.fetched(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of one model, such as unet/ of a pipeline")
    return read_json(path), path


def module_and_shapes(module: type, fields: Mapping, source: str | Path):
    """The module with these fields, and the shapes of its variables.

    source: file of the fields, for the ValueError if no network can be built from them.
    """
    try:
        instance = module(**fields)
        return instance, shapes_of(instance)
    except Exception as error:  # a config can be wrong in any way
        raise ValueError(f"{source}: no network can be built from it: {first_line(error)}") from None


def _fields(module: type, config: Mapping, source: str | Path) -> dict:
    """Arguments of `module` from a diffusers config. Raises ValueError for options that the module does not support."""
    fields = {field.name for field in dataclasses.fields(module)} - RUNTIME_FIELDS - FOREIGN[config["_class_name"]]
    for name, value in config.items():
        inert = name.startswith("_") or name in fields | NO_EFFECT or value in (None, False, *FIXED.get(name, ()))
        if not inert:
            raise ValueError(f"{source}: {name}={value!r} is not supported")
    values = DEFAULTS[config["_class_name"]] | {name: value for name, value in config.items() if name in fields}
    return {name: _as_tuple(value) for name, value in values.items()}


def _as_tuple(value):
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value


def _save(class_name, module, extra, variables, folder, dtype, more_tensors=MappingProxyType({})):
    folder = paths.at(folder)
    names = {field.name for field in dataclasses.fields(module)} - RUNTIME_FIELDS - FOREIGN[class_name]
    fields = {name: getattr(module, name) for name in sorted(names)}
    if not fields.get("target_embedding"):
        fields.pop("target_embedding", None)  # unknown to diffusers
    config = {"_class_name": class_name, **fields, **extra}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / f"{WEIGHTS}.safetensors", to_torch(variables) | more_tensors, dtype)
    write_json(folder / "config.json", config)  # last: a folder that has it is complete
