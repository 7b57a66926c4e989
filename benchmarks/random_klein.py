"""A folder of FLUX.2 klein 4B as diffusers writes it, full size or tiny, with random weights in bfloat16.

    python -m benchmarks.random_klein FOLDER [--quick]

The full size takes 16 GB of disk, and 9 GB of memory while it is written. Its tokenizer knows only bytes.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from tokenizers import pre_tokenizers

from benchmarks import quick
from diffusion_jax.interop.components import AUTOENCODER, TEXT_ENCODER, TRANSFORMER
from diffusion_jax.interop.families import sizes
from diffusion_jax.interop.tensors import read_json, write_json
from diffusion_jax.stored import Stored

PARTS = {"text_encoder": TEXT_ENCODER, "transformer": TRANSFORMER, "vae": AUTOENCODER}
TINY = {  # fields that differ; klein reads 27 layers of its text encoder
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 28, "num_attention_heads": 2}
    | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 264},
    "transformer": {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    | {"axes_dims_rope": (4, 4, 4, 4), "joint_attention_dim": 96, "timestep_guidance_channels": 16, "in_channels": 16},
    "vae": {"block_out_channels": (32, 32), "layers_per_block": 1, "latent_channels": 4}
    | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
INDEX = {
    "_class_name": "Flux2KleinPipeline",
    "is_distilled": True,
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
    "tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
TOKENS = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}


def write(folder: Path, changed: Mapping[str, Mapping] | None = None) -> None:
    """Write the folder. changed: fields of the config.json of each part that differ from those of klein 4B."""
    for i, (name, component) in enumerate(PARTS.items()):
        config = {**sizes.KLEIN_4B[name], **(changed or {}).get(name, {})}
        module, shapes = component.build(config, name)
        component.save(module, _random(shapes, seed=i), folder / name, jnp.bfloat16)
    file = folder / "text_encoder" / "config.json"
    write_json(file, read_json(file) | {"tie_word_embeddings": True})
    write_json(folder / "scheduler" / "scheduler_config.json", sizes.KLEIN_4B["scheduler"])
    write_json(folder / "model_index.json", INDEX)
    _write_tokenizer(folder / "tokenizer")


def _random(shapes: PyTree, seed: int) -> PyTree:
    """Variables that are drawn when they are written: kernels of unit gain, norms that change nothing."""

    def values(i: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            return np.full(shape, name in ("scale", "running_var"), jnp.bfloat16)
        std = 0.02 if name == "embedding" else math.prod(shape[:-1]) ** -0.5
        return (std * np.random.default_rng((seed, i)).standard_normal(shape, np.float32)).astype(jnp.bfloat16)

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    drawn = [functools.partial(values, i, path[-1].key, leaf.shape) for i, (path, leaf) in enumerate(leaves)]
    dtype = np.dtype(jnp.bfloat16)
    return structure.unflatten([Stored(leaf.shape, dtype, f) for (_, leaf), f in zip(leaves, drawn, strict=True)])


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    added = {
        str(len(alphabet) + i): {"content": name, "special": special}
        | dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        for i, (name, special) in enumerate(TOKENS.items())
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    config |= {"model_max_length": 131072, "unk_token": None, "bos_token": None, "chat_template": CHAT}
    write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": added})
    write_json(folder / "vocab.json", {letter: i for i, letter in enumerate(alphabet)})
    (folder / "merges.txt").write_text("#version: 0.2\n")


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args()
    write(flags.folder, TINY if flags.quick else None)


if __name__ == "__main__":
    main()
