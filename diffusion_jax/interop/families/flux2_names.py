"""Names of FLUX.2's transformer in the code of Black Forest Labs: in its own files, and in those of ComfyUI and LoRAs.

Files of LoRA for FLUX.1 have many of the same names, and maps of other sizes.
"""

import re

from diffusion_jax.interop.family import Config, Tensors, transformer_names
from diffusion_jax.interop.originals import EXCHANGED, Places, by_table, fused, length_of

_TIME, _DOUBLE, _SINGLE = "time_guidance_embed", "transformer_blocks.*", "single_transformer_blocks.*.attn"
TABLE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{name}_in.{side}_layer": f"{_TIME}.{ours}_embedder.linear_{number}"
        for name, ours in (("time", "timestep"), ("guidance", "guidance"))
        for side, number in (("in", 1), ("out", 2))
    },
    **{
        f"{name}.lin": f"{name}.linear"
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
    },
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": {"norm_out.linear": EXCHANGED},  # shift and scale: here scale and shift
    "double_blocks.*.img_attn.qkv": fused(*(f"{_DOUBLE}.attn.to_{letter}" for letter in "qkv")),
    "double_blocks.*.txt_attn.qkv": fused(*(f"{_DOUBLE}.attn.add_{letter}_proj" for letter in "qkv")),
    "double_blocks.*.img_attn.proj": f"{_DOUBLE}.attn.to_out.0",
    "double_blocks.*.txt_attn.proj": f"{_DOUBLE}.attn.to_add_out",
    **{
        f"double_blocks.*.{stream}_attn.norm.{name}_norm": f"{_DOUBLE}.attn.norm_{added}{name[0]}"
        for stream, added in (("img", ""), ("txt", "added_"))
        for name in ("query", "key")
    },
    **{
        f"double_blocks.*.{stream}_mlp.{number}": f"{_DOUBLE}.{ours}.linear_{side}"
        for stream, ours in (("img", "ff"), ("txt", "ff_context"))
        for number, side in ((0, "in"), (2, "out"))
    },
    "single_blocks.*.linear1": f"{_SINGLE}.to_qkv_mlp_proj",
    "single_blocks.*.linear2": f"{_SINGLE}.to_out",
    **{f"single_blocks.*.norm.{name}_norm": f"{_SINGLE}.norm_{name[0]}" for name in ("query", "key")},
}
_FLUX_1 = re.compile(  # maps that FLUX.2 does not have, by the names of both
    r"double_blocks[._]\d+[._](img|txt)_mod|single_blocks[._]\d+[._]modulation|vector_in"
    r"|time_text_embed|single_transformer_blocks[._]\d+[._](proj_|norm|attn[._]to_[qkv]$)"
    r"|transformer_blocks[._]\d+[._](norm1|ff(_context)?[._]net)"
)
_original = by_table(TABLE)


def _places(path: str) -> Places:
    if _FLUX_1.match(path):
        raise ValueError("belongs to a map of FLUX.1, which FLUX.2 does not have")
    return _original(path)


NAMES = transformer_names(_places)


def sizes_of(tensors: Tensors, config: Config) -> Config:
    """See `Family.sizes_of`."""
    width, channels = tensors["x_embedder.weight"].shape
    head, text = len(tensors["transformer_blocks.0.attn.norm_q.weight"]), tensors["context_embedder.weight"].shape[1]
    sizes = {
        "in_channels": channels,
        "out_channels": None if len(tensors["proj_out.weight"]) == channels else len(tensors["proj_out.weight"]),
        "num_layers": length_of(tensors, "transformer_blocks."),
        "num_single_layers": length_of(tensors, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text,
        "timestep_guidance_channels": tensors[f"{_TIME}.timestep_embedder.linear_1.weight"].shape[1],
        "mlp_ratio": tensors["transformer_blocks.0.ff.linear_out.weight"].shape[1] / width,
        "guidance_embeds": f"{_TIME}.guidance_embedder.linear_1.weight" in tensors,
    }
    if sizes["guidance_embeds"] or text != config["joint_attention_dim"]:
        blocks, guided = length_of(tensors, "single_transformer_blocks."), " and a guidance scale"
        raise ValueError(
            f"its transformer, of width {width} with {blocks} single blocks, reads a text of width {text}"
            f"{guided if sizes['guidance_embeds'] else ''}, and that of the checkpoint's folder a text of width "
            f"{config['joint_attention_dim']}: name the folder of its own size of FLUX.2 klein"
        )
    return sizes
