"""A folder of Stable Diffusion 1.5 as diffusers writes it, full size or tiny, with diffusers' random weights.

    python -m benchmarks.random_pipeline FOLDER [--quick]

Its tokenizer knows only single letters, with ids in CLIP's range. Prompts have 77 tokens.
"""

import json
from pathlib import Path

from benchmarks import families, quick
from benchmarks.families import UNET

AUTOENCODER = families.AUTOENCODER | {"sample_size": 512}
TEXT = families.CLIP_L | {
    "max_position_embeddings": 77,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
TINY = (
    quick.tiny_unet(UNET, sample_size=8, cross_attention_dim=32),
    quick.tiny(AUTOENCODER, sample_size=64),
    quick.tiny(TEXT),
)
SCHEDULER = families.NOISE | {"timestep_spacing": "trailing"}
BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def write(folder: str | Path, tiny: bool) -> None:
    """Write the folder. tiny: of networks with few channels."""
    import torch
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, autoencoder, text = TINY if tiny else (UNET, AUTOENCODER, TEXT)
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
    parser = quick.parser(__doc__)
    parser.add_argument("folder")
    flags = parser.parse_args()
    write(flags.folder, flags.quick)


if __name__ == "__main__":
    main()
