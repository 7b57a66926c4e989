"""The card of a made-up family, with names of its own for parts, classes and tensors."""

from diffusion_jax.interop import folders
from diffusion_jax.interop.components import AUTOENCODER, TEXT_ENCODER, UNET
from diffusion_jax.interop.family import Description, Family, FileNames, Prompt, SingleFile
from diffusion_jax.interop.prompts import emphasised

SCHEDULER = {"_class_name": "DDIMScheduler", "beta_schedule": "linear", "prediction_type": "v_prediction"}
CONFIGS = {}  # of the parts in one file
PAINTER = UNET._replace(
    class_name=lambda module: "Painter",
    build=lambda config, source: folders.unet_of({**config, "_class_name": "UNet2DConditionModel"}, source),
    tensors=lambda tensors, module: {name.replace("entry", "conv_in"): tensor for name, tensor in tensors.items()},
)


def read(tensors):
    parts = {part: Description(config, {}) for part, config in CONFIGS.items()}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part].tensors[name] = tensor
    return parts


FAMILY = Family(
    name="Painters",
    licence="CC0-1.0",
    source="this test",
    recognises=lambda index, configs: index["_class_name"] == "PaintersPipeline",
    parts={"painter": PAINTER, "shrinker": AUTOENCODER, "reader": TEXT_ENCODER},
    denoiser="painter",
    autoencoder="shrinker",
    tokenizers={"reader": "words"},
    prompt=Prompt(embed=emphasised(lambda output: output.penultimate), null_is_zeros=lambda index: True),
    index=lambda painter: {"_class_name": "PaintersPipeline"},
    single_file=SingleFile(read, SCHEDULER),
    names=FileNames(prefixes={"painted": "painter"}),
)
