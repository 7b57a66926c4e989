"""What the families of Stable Diffusion share: checkpoints in one file, with the tensor names of the original code.

Such a file has no configs. Infer the architecture from tensor shapes, and the rest from the family's `Layout`. Tensors
are renamed as in diffusers and transformers, so that the code for folders can build every part.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.interop.encoders import qualified
from diffusion_jax.interop.families.statements import stated
from diffusion_jax.interop.family import Config, Description, FileNames, Tensors
from diffusion_jax.interop.originals import WHOLE, length_of
from diffusion_jax.models.autoencoder import AutoencoderKL
from diffusion_jax.models.unet import UNet

# A dot in these patterns matches any character, so that they also match names joined by underscores.
UNET = [
    (r"^time_embed.0", "time_embedding.linear_1"),
    (r"^time_embed.2", "time_embedding.linear_2"),
    (r"^label_emb.0.0", "add_embedding.linear_1"),
    (r"^label_emb.0.2", "add_embedding.linear_2"),
    (r"^label_emb(?=.weight)", "class_embedding"),
    (r"^input_blocks.0.0", "conv_in"),
    (r"^middle_block.0", "mid_block.resnets.0"),
    (r"^middle_block.1", "mid_block.attentions.0"),
    (r"^middle_block.2", "mid_block.resnets.1"),
    (r"^out.0", "conv_norm_out"),
    (r"^out.2", "conv_out"),
    (r"in_layers.0", "norm1"),
    (r"in_layers.2", "conv1"),
    (r"emb_layers.1", "time_emb_proj"),
    (r"out_layers.0", "norm2"),
    (r"out_layers.3", "conv2"),
    (r"skip_connection", "conv_shortcut"),
]
AUTOENCODER = [
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.\1sample\.", r".\1_blocks.\2.\1samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
]
OPEN_CLIP = [
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
]
INERT = re.compile(r"(^loss|\.?position_ids$|^logit_scale$|^attn_mask$)")  # unused by these networks
# Outside the networks: averaged copies, state of trainers, tables of the schedule, and what `statements` reads.
OUTSIDE = re.compile(
    r"model_ema\.|(sqrt_|log_one_minus_|posterior_|alphas_cumprod)\w*$|denoiser\.\w*sigmas$"
    r"|(betas|lvlb_weights|logvar|scale_factor|v_pred|ztsnr|epoch|global_step|learning_rate)$"
    r"|(callbacks|loss_fn|denoiser\.weighting|embedding_manager)\b"
    r"|(cond_stage_model|conditioner)\.(.*\.)?(logit_scale|text_projection(\.weight)?)$"
)

SCHEDULER = {  # how all of them were trained
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
KOHYA = {
    "lycoris": "unet",
    **{
        f"{kind}_{name}": part
        for kind in ("lora", "lycoris")
        for name, part in {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}.items()
    },
}
DOTTED = {  # of ComfyUI, and of OneTrainer (OMI)
    **KOHYA,
    "diffusion_model": "unet",
    "model.diffusion_model": "unet",
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders.clip_l.transformer": "text_encoder",
    "text_encoders.clip_h.transformer": "text_encoder",
    "text_encoders.clip_g.transformer": "text_encoder_2",
}


class Layout(NamedTuple):
    """What differs between the families in a single file.

    matches: tensors of the U-Net -> whether it is of this family.
    sample_size: of the U-Net, latents on a side.
    scaling_factor: of the autoencoder, unless the file has its own.
    encoders: (part, prefix of its tensors, tensors -> Description). A part may have several layouts.
    encoder_layer: the layer of the text encoders that the denoiser uses, counted from the end.
    needs_encoder: whether a file without any of them is of another family.
    """

    matches: Callable[[Tensors], bool]
    sample_size: int
    scaling_factor: float
    encoders: Sequence[tuple[str, str, Callable[[Tensors], Description]]]
    encoder_layer: int = 2
    needs_encoder: bool = False

    def states(self, tensors: Tensors, header: Mapping[str, str]) -> Config:
        """See `SingleFile.states`.

        Raises ValueError also for unknown tensors, such as the mean and deviation of the latents of EDM models.
        """
        prefixes = ("model.diffusion_model.", "first_stage_model.", *(prefix for _, prefix, _ in self.encoders))
        unknown = sorted(name for name in tensors if not name.startswith(prefixes) and not OUTSIDE.match(name))
        if unknown:
            first = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
            raise ValueError(f"{first} would change or extend the model in a way that is not supported")
        return stated(tensors, header, SCHEDULER, self.encoder_layer)

    def read(self, tensors: Tensors) -> dict[str, Description] | None:
        """The parts of a file, None if it is of another family."""
        unet = _under(tensors, "model.diffusion_model.")
        if "input_blocks.0.0.weight" not in unet or not self.matches(unet):
            return None
        texts = [(part, _under(tensors, prefix), describe) for part, prefix, describe in self.encoders]
        encoders = {part: describe(named) for part, named, describe in texts if named}
        if self.needs_encoder and not encoders:
            return None
        autoencoder = _under(tensors, "first_stage_model.")
        scaling_factor = float(np.ravel(tensors.get("scale_factor", self.scaling_factor))[0])
        if not 0 < scaling_factor < np.inf:
            raise ValueError(f"scale_factor is {scaling_factor}, expected a finite number above 0")
        return {
            "unet": _unet(unet, self.sample_size),
            "vae": _autoencoder(autoencoder, 8 * self.sample_size, scaling_factor),
            **encoders,
        }


def has_vector(unet: Tensors) -> bool:
    """Whether a U-Net is conditioned on a vector of the prompt and the sizes of the image."""
    return "label_emb.0.0.weight" in unet


def has_linear_maps(unet: Tensors) -> bool:
    """Whether linear maps surround the transformers of a U-Net, instead of 1x1 convolutions."""
    return any(tensor.ndim == 2 for name, tensor in unet.items() if name.endswith("proj_in.weight"))


def fits(unet: UNet, autoencoder: AutoencoderKL) -> str:
    """What is wrong with a U-Net and an autoencoder together."""
    channels = autoencoder.channels
    if unet.in_channels not in (channels, 2 * channels + 1):
        return "expected a U-Net whose input is the noisy latents, or for inpainting also a mask and the known latents"
    if unet.out_channels != channels:
        return f"expected a U-Net of {channels} output channels, those of the latents, got {unet.out_channels}"
    return ""


def index_of(name: str, has_safety_checker: bool) -> Callable[[UNet], dict]:
    """module of the U-Net -> model_index.json without its parts.

    name: beginning of the name of the pipeline's class in diffusers, such as "StableDiffusion".
    has_safety_checker: whether the class of the pipeline supports a safety checker.
    """
    no_checker = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}

    def index(unet: UNet) -> dict:
        kind = "Inpaint" if unet.known_channels else ""
        return {"_class_name": f"{name}{kind}Pipeline"} | (no_checker if has_safety_checker else {})

    return index


def unet_name(name: str, layers: int) -> str:
    """The name in diffusers of a tensor of the U-Net (or of its LoRA, joined by underscores).

        input_blocks.n.0|1   n - 1 = block·(layers + 1) + layer    resnets|attentions of down_blocks, or a downsampler
        output_blocks.n.0|1  n = block·(layers + 1) + layer        resnets|attentions of up_blocks, or an upsampler

    layers: residual blocks of a level.
    """
    name = _rename(name, UNET)
    match = re.match(r"(input|output)_blocks.(\d+).(\d).(op|conv(?![12_]))?", name)  # not conv1, conv_shortcut
    if not match:
        return name
    side, number, kind, resampling = match.groups()
    block, layer = divmod(int(number) - (side == "input"), layers + 1)
    prefix = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if resampling:
        return f"{prefix}.{'down' if side == 'input' else 'up'}samplers.0.conv{name[match.end() :]}"
    return f"{prefix}.{('resnets', 'attentions')[int(kind)]}.{layer}.{name[match.end() :]}"


def _unet(tensors, sample_size):
    downsamplers = [int(name.split(".")[1]) for name in tensors if re.match(r"input_blocks\.\d+\.0\.op\.", name)]
    layers = min(downsamplers) - 1
    tensors = {unet_name(name, layers): tensor for name, tensor in tensors.items()}
    widths = [
        len(tensors[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(length_of(tensors, "down_blocks."))
    ]
    down, up = ([_depths(tensors, f"{side}_blocks.{i}.") for i in range(len(widths))] for side in ("down", "up"))
    linear = has_linear_maps(tensors)
    added = tensors.get("add_embedding.linear_1.weight")
    return Description(
        {
            "_class_name": "UNet2DConditionModel",
            "sample_size": sample_size,
            "in_channels": tensors["conv_in.weight"].shape[1],
            "out_channels": len(tensors["conv_out.weight"]),
            "block_out_channels": widths,
            "layers_per_block": layers,
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in down],
            "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in up],
            **_middle_and_depths(tensors, down, up),
            "cross_attention_dim": _first(tensors, ".attn2.to_k.weight").shape[1],
            "attention_head_dim": [width // 64 for width in widths] if linear else 8,
            "use_linear_projection": linear,
            "num_class_embeds": len(tensors["class_embedding.weight"]) if "class_embedding.weight" in tensors else None,
            "addition_embed_type": None if added is None else "text_time",
            "addition_time_embed_dim": None if added is None else 256,
            "projection_class_embeddings_input_dim": None if added is None else added.shape[1],
            "upcast_attention": linear and added is None,
        },
        tensors,
    )


def _middle_and_depths(tensors, down, up):
    """Fields of config.json: the kind of the middle block, and the transformer blocks in each attention.

    down, up: depths of the levels, in the order of the blocks. SSD-1B and Segmind-Vega have one residual block in the
    middle, and other depths upwards than downwards. The smallest distilled networks (KOALA, BK-SDM) have no middle.
    """
    resnets, middle = length_of(tensors, "mid_block.resnets."), _depths(tensors, "mid_block.")
    if resnets > 1 and not middle:
        raise KeyError("mid_block.attentions.0")
    depths = [*(depth or 1 for depth in down[:-1]), down[-1] or middle or 1]  # the middle has that of the last level
    mirrored = all(upward in (0, depth) for upward, depth in zip(reversed(up), depths, strict=True))
    return {
        "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")[resnets],
        "transformer_layers_per_block": depths,
        "reverse_transformer_layers_per_block": None if mirrored else [depth or 1 for depth in up],
    }


def _depths(tensors, block):
    """The number of transformer blocks in each attention of a block: one number if all have the same, 0 without any."""
    count = length_of(tensors, f"{block}attentions.")
    depths = [length_of(tensors, f"{block}attentions.{i}.transformer_blocks.") for i in range(count)]
    return depths if len(set(depths)) > 1 else max(depths, default=0)


def _first(tensors, ending):
    """A tensor whose name ends so. Raises KeyError without any."""
    return tensors[next((name for name in tensors if name.endswith(ending)), ending)]


def _autoencoder(tensors, sample_size, scaling_factor):
    tensors = {_rename(name, AUTOENCODER): tensor for name, tensor in tensors.items()}
    levels = length_of(tensors, "decoder.up_blocks.")
    mirrored = re.compile(r"(decoder\.up_blocks\.)(\d+)")  # the original counts levels from the finest
    tensors = {
        mirrored.sub(lambda match: f"{match[1]}{levels - 1 - int(match[2])}", name): _linear(name, tensor)
        for name, tensor in tensors.items()
    }
    return Description(
        {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [
                len(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels)
            ],
            "layers_per_block": length_of(tensors, "encoder.down_blocks.0.resnets."),
            "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "sample_size": sample_size,
            "scaling_factor": scaling_factor,
        },
        tensors,
    )


def _linear(name, tensor):
    """Convert the maps of the middle attention, 1x1 convolutions in the original, to linear maps."""
    return tensor.reshape(tensor.shape[:2]) if ".attentions." in name and tensor.ndim == 4 else tensor


def clip(tensors: Tensors) -> Description:
    """The text encoder of OpenAI's CLIP, in the layout of any version of transformers, without the projection of the
    pooled text that some files have.
    """
    tensors = {qualified(name): tensor for name, tensor in tensors.items() if name != "text_projection.weight"}
    return Description(_text_config(tensors, "quick_gelu", "CLIPTextModel"), tensors)


def open_clip(tensors: Tensors, skip: int = 0, projection: bool = True) -> Description:
    """The text encoder of OpenCLIP.

    skip: last layers to drop, which the denoiser does not use.
    projection: keep that of the pooled text.
    """
    count, renamed = length_of(tensors, "transformer.resblocks."), {}
    skipped = tuple(f"transformer.resblocks.{count - 1 - i}." for i in range(skip))
    for name, tensor in tensors.items():
        if name.startswith(skipped) or (name == "text_projection" and not projection):
            continue
        new_name = _rename(name, OPEN_CLIP)
        if ".in_proj_" in new_name:  # q, k and v in one tensor
            head, leaf = new_name.split("in_proj_")
            renamed |= {
                f"{head}{letter}_proj.{leaf}": third for letter, third in zip("qkv", np.split(tensor, 3), strict=True)
            }
        else:
            renamed[new_name] = tensor.T if name == "text_projection" else tensor
    return Description(_text_config(renamed, "gelu", "CLIPTextModel" + "WithProjection" * projection), renamed)


def _text_config(tensors, activation, name):
    vocabulary, width = tensors["text_model.embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "architectures": [name],
        "model_type": "clip_text_model",
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": len(tensors["text_model.encoder.layers.0.mlp.fc1.weight"]),
        "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": length_of(tensors, "text_model.encoder.layers."),
        "projection_dim": width if projection is None else len(projection),
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _under(tensors: Mapping[str, np.ndarray], prefix: str) -> Tensors:
    """The tensors with this prefix, under their names without it."""
    unprefixed = ((name.removeprefix(prefix), tensor) for name, tensor in tensors.items() if name.startswith(prefix))
    return {name: tensor for name, tensor in unprefixed if not INERT.search(name)}


def _rename(name, rules):
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _places(part, path, unet):
    """Files of kohya for SDXL and those of ComfyUI use the names of the original code; older files of diffusers omit
    an index, and have names of their own for the attention of text encoders.
    """
    if part == "unet":
        path = unet_name(path, int(np.max(unet.layers_per_block)))
    path = re.sub(r"\.to_out$", ".to_out.0", path)
    return {re.sub(r"self_attn\.to_(q|k|v|out)(\.0)?$", r"self_attn.\1_proj", path): WHOLE}


NAMES = FileNames(prefixes=KOHYA, dotted=DOTTED, places=_places)

ONE_ENCODER = (  # of Stable Diffusion 1, and of 2, whose denoiser does not use the last layer
    ("text_encoder", "cond_stage_model.transformer.", clip),
    ("text_encoder", "cond_stage_model.model.", functools.partial(open_clip, skip=1, projection=False)),
)
