"""Check that a model and its data fit together, before anything starts."""

import numpy as np
from absl import logging
from jaxtyping import PyTree
from ml_collections import ConfigDict

from diffusion_jax.build.agreement import condition_kind
from diffusion_jax.conditioning import Conditioning
from diffusion_jax.data.sources import Source, first_caption
from diffusion_jax.models.text.encoder import count_cut

SAMPLED = 1000  # captions


def check_condition(null_cond: PyTree, source: Source) -> None:
    """Raise ValueError for a source that lacks the condition of a model. null_cond: its "no condition"."""
    kind = condition_kind(null_cond)
    if kind == "text" and not source.captions:
        raise ValueError(f"a text-conditional model needs data with captions, and {source.name} has none")
    if kind != "class":
        return
    num_classes = int(null_cond["label"])  # the class after the last is none
    if source.num_classes != num_classes:
        has = f"{source.num_classes} classes" if source.num_classes else "no labels"
        raise ValueError(
            f"the model has {num_classes} classes and {source.name} has {has}: set config.condition.kind and "
            "config.condition.num_classes; a checkpoint needs data with its own number of classes"
        )


def check_records(train: ConfigDict, source: Source) -> None:
    """Raise ValueError for batches larger than the whole source.

    train: the section with batch_size.
    """
    if train.batch_size > len(source):
        raise ValueError(
            f"train.batch_size must be at most {len(source)}, the records of {source.name}, got {train.batch_size}; "
            "lower it, or name more data"
        )


def tell_cut_captions(conditioning: Conditioning, source: Source) -> None:
    """Log how many captions, of a sample, are longer than the text encoders read."""
    chosen = np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(int).tolist()
    captions = [first_caption(source.captions[index]) for index in chosen] if source.captions else []
    for name, tokenizer in conditioning.tokenizers().items() if captions else ():
        if cut := count_cut(captions, tokenizer):
            limit = f"{tokenizer.truncation['max_length']} tokens of {name}"
            logging.warning("%d of %d sampled captions are longer than %s, and are cut", cut, len(captions), limit)
