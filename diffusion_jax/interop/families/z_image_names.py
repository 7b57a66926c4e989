"""Names of Z-Image's transformer in files of ComfyUI, and in LoRAs for them."""

from diffusion_jax.interop.family import Config, Tensors, transformer_names
from diffusion_jax.interop.originals import Places, by_table, fused, length_of

PATCH = "2-1"  # pixels of a patch, and its frames
TABLE: dict[str, str | Places] = {
    "x_embedder": f"all_x_embedder.{PATCH}",
    "final_layer.linear": f"all_final_layer.{PATCH}.linear",
    "final_layer.adaLN_modulation.1": f"all_final_layer.{PATCH}.adaLN_modulation.1",
    "norm_final": {},  # not used
}
for _block in ("noise_refiner.*", "context_refiner.*", "layers.*"):
    TABLE |= {
        f"{_block}.attention.qkv": fused(*(f"{_block}.attention.to_{letter}" for letter in "qkv")),
        f"{_block}.attention.out": f"{_block}.attention.to_out.0",
        f"{_block}.attention.q_norm": f"{_block}.attention.norm_q",
        f"{_block}.attention.k_norm": f"{_block}.attention.norm_k",
    }
NAMES = transformer_names(by_table(TABLE))


def sizes_of(tensors: Tensors, config: Config) -> Config:
    """See `Family.sizes_of`."""
    dim, patch = tensors[f"all_x_embedder.{PATCH}.weight"].shape
    text = tensors["cap_embedder.1.weight"].shape[1]
    if text != config["cap_feat_dim"]:
        raise ValueError(
            f"its transformer reads a text of width {text}, and that of the checkpoint's folder one of width "
            f"{config['cap_feat_dim']}: name the folder of its own pipeline"
        )
    return {
        "in_channels": patch // 4,
        "dim": dim,
        "n_layers": length_of(tensors, "layers."),
        "n_refiner_layers": length_of(tensors, "noise_refiner."),
        "n_heads": dim // len(tensors["layers.0.attention.norm_q.weight"]),
    }
