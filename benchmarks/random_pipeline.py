"""A folder of Stable Diffusion 1.5 as diffusers writes it, full size or tiny, with diffusers' random weights.

    python -m benchmarks.random_pipeline FOLDER [--quick]

Its tokenizer knows only single letters, with ids in CLIP's range. Prompts have 77 tokens.
"""

import argparse
import json
from pathlib import Path

from benchmarks import families

UNET = {  # fields of unet/config.json that differ from diffusers' defaults; below the same for the other networks
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
AUTOENCODER = families.AUTOENCODER | {"sample_size": 512}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
TINY = (
    UNET | {"sample_size": 8, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32},
    AUTOENCODER | {"sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1},
    TEXT | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
)
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write(folder: str | Path, quick: bool) -> None:
    """Write the folder. quick: tiny networks."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, autoencoder, text = TINY if quick else (UNET, AUTOENCODER, TEXT)
    torch.manual_seed(0)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**autoencoder),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=_tokenizer(Path(folder) / "tokenizer"),
        unet=UNet2DConditionModel(**unet),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_vocabulary(folder: Path, first_mark: int) -> None:
    """A vocabulary like CLIP's: letters, letters at the end of words, and from first_mark the start and end token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {BOS: first_mark, EOS: first_mark + 1}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _tokenizer(folder):
    from transformers import CLIPTokenizer

    write_vocabulary(folder, TEXT["bos_token_id"])
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--quick", action="store_true", help="tiny networks")
    flags = parser.parse_args()
    write(flags.folder, flags.quick)


if __name__ == "__main__":
    main()
