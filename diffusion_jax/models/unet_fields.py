"""What the fields of a U-Net may be."""

from typing import Any

import numpy as np

BLOCK_TYPES = {  # diffusers' name of a block -> the kind of attention after each of its residual blocks
    "DownBlock2D": None,
    "AttnDownBlock2D": "self",
    "CrossAttnDownBlock2D": "cross",
    "UpBlock2D": None,
    "AttnUpBlock2D": "self",
    "CrossAttnUpBlock2D": "cross",
    "UNetMidBlock2D": "self",
    "UNetMidBlock2DCrossAttn": "cross",
}


def check_fields(unet: Any) -> None:
    """Raise ValueError for fields of a `UNet` that contradict each other."""
    levels = len(unet.block_out_channels)
    for field in (
        "down_block_types",
        "up_block_types",
        "layers_per_block",
        "attention_head_dim",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
        "only_cross_attention",
    ):
        value = getattr(unet, field)
        if isinstance(value, (tuple, list)) and len(value) != levels:
            raise ValueError(
                f"UNet: {field} has {len(value)} entries, block_out_channels has {levels}; "
                "give one entry for each level"
            )
    for part, field in (("Down", "down_block_types"), ("Mid", "mid_block_type"), ("Up", "up_block_types")):
        allowed = [name for name in BLOCK_TYPES if part in name]
        for name in np.atleast_1d(getattr(unet, field) or ()):
            if name not in allowed:
                raise ValueError(f"UNet: {field} has {str(name)!r}; expected one of {', '.join(allowed)}")
    for field, allowed in (
        ("resnet_time_scale_shift", ("default", "scale_shift")),
        ("class_embed_type", (None, "projection")),
        ("addition_embed_type", (None, "text_time")),
    ):
        if getattr(unet, field) not in allowed:
            raise ValueError(f"UNet: {field} must be one of {allowed}, got {getattr(unet, field)!r}")
    if unet.addition_embed_type and not unet.addition_time_embed_dim:
        raise ValueError("UNet: addition_embed_type='text_time' needs addition_time_embed_dim")
    if unet.class_embed_type and (unet.num_class_embeds or unet.addition_embed_type):
        other = "num_class_embeds" if unet.num_class_embeds else "addition_embed_type"
        raise ValueError(f"UNet: class_embed_type and {other} exclude each other")
