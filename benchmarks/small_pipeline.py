"""A small untrained model of the Stable Diffusion family and drawings to train it on, without torch or downloads.

    python -m benchmarks.small_pipeline FOLDER

FOLDER/model: the trained first stage of weights/emoji, a random CLIP text encoder whose tokenizer knows only
letters, a random U-Net. FOLDER/drawings: 16 outlined drawings with their names; FOLDER/swapped: the same with red
and blue exchanged.
"""

import json
from pathlib import Path

import jax
from PIL import Image

from benchmarks import quick, random_pipeline
from diffusion_jax.core import schedules
from diffusion_jax.data import sources
from diffusion_jax.data.scenes import Scene, paint
from diffusion_jax.interop import load_autoencoder, load_tokenizer, save_pipeline
from diffusion_jax.interop.families import stable_diffusion_1
from diffusion_jax.interop.pipeline import Part, PublishedPipeline
from diffusion_jax.models.text.clip import ClipTextEncoder
from diffusion_jax.models.unet import UNet

NAMES = (
    *("banana", "blossom", "cactus", "cherries", "grinning cat", "mushroom", "octopus", "pear", "pizza"),
    *("red apple", "red heart", "rocket", "snowman", "sun", "tiger face", "tulip"),
)
FIELDS = {  # of the U-Net
    "sample_size": 8,
    "block_out_channels": (64, 128, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 64,
}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("folder", type=Path)
    flags = parser.parse_args()
    quick.note(flags.quick)
    write_drawings(flags.folder)
    write_model(flags.folder / "model", UNet(**(quick.tiny_unet(FIELDS) if flags.quick else FIELDS)))


def write_drawings(folder: Path) -> None:
    for name in ("drawings", "swapped"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for drawing in sources.emoji_drawings(styles=("outlined",)):
        if drawing.name in NAMES:
            picture = paint(Scene(drawing), 64)
            for name, image in (("drawings", picture), ("swapped", picture[..., ::-1])):
                file = folder / name / f"{drawing.name.replace(' ', '_')}.png"
                Image.fromarray(image).save(file)
                file.with_suffix(".txt").write_text(drawing.name)


def write_model(folder: Path, unet: UNet) -> None:
    tokenizer = _tokenizer(folder / "tokenizer")
    text = ClipTextEncoder(
        vocab_size=54, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    save_pipeline(
        PublishedPipeline(
            family=stable_diffusion_1.FAMILY,
            parts={
                "unet": _random(unet),
                "vae": Part(*load_autoencoder(quick.ROOT / "weights" / "emoji" / "vae")),
                "text_encoder": _random(text),
            },
            tokenizers=(tokenizer,),
            schedule=schedules.scaled_linear(),
            prediction="eps",
            scheduler=stable_diffusion_1.FAMILY.single_file.scheduler,
        ),
        folder,
    )


def _random(module: UNet | ClipTextEncoder) -> Part:
    return Part(module, jax.jit(module.init)(jax.random.key(0), *module.example_inputs()))


def _tokenizer(folder: Path):
    random_pipeline.write_vocabulary(folder, first_mark=52)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": random_pipeline.EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(folder)


if __name__ == "__main__":
    main()
