r"""Published checkpoints of Stable Diffusion 1, 2 and XL, FLUX.2 klein, Z-Image, and DiT: sample, fine-tune, export.

    SD="python main.py --config=configs/published.py --config.checkpoint=FOLDER"
    $SD --mode=sample --prompt "a (red:1.3) castle"
    $SD --mode=train --config.data.path=PHOTOS
    $SD --mode=export

FOLDER is what diffusers saves (model_index.json, unet/, vae/, …), or one .safetensors file in the original layout, to
which --config.tokenizers=FOLDER gives the tokenizers of its family. Inpainting models, whose U-Net sees the mask, need
--config.sample.image and --config.sample.mask.

Guidance 1 is none. The authors of Z-Image count from 0: their 5 is --config.sample.guidance=6. Z-Image-Turbo has
guidance built in: sample it with --config.sample.guidance=1 --config.sample.steps=8. Its folder differs from that of
Z-Image by the scheduler alone: a shift of 3 means Turbo, unless model_index.json has "is_distilled": false. Fine-tune
Z-Image and not Turbo, which would lose the ability to draw in few steps.

The prompts of DiT are classes, by number or name, and it is fine-tuned on data with labels. --config.scan compiles one
of its blocks for all. The files of its authors, and of SiT, hold the transformer alone (docs/transformers.md):

    DIT="--config.checkpoint=DiT-XL-2-256x256.pt --config.allow_pickle=True --config.vae=FOLDER"
    python main.py --config=configs/published.py $DIT --config.prediction=eps --mode=sample --prompt "207"

--config.denoiser=FILE reads the transformer of FLUX.2 klein or Z-Image from a file of its authors or of ComfyUI, and
the other parts from FOLDER.

--config.loras="('FILE@0.8', …)" adds files of LoRA, LoCon, DoRA, LoHa and LoKr to the weights, with these factors.
--config.embeddings="('FILE', 'FILE@WORD', …)" adds the learned words of textual inversion, which prompts use by name:
that in the file, or the name of the file, or WORD.
--config.clip_skip=1 leaves out the last layer of the text encoder of Stable Diffusion 1 or 2, as some of its relatives
were trained; web interfaces call it clip skip 2.

Fine-tuning trains the whole U-Net on a folder of images with captions (any data source will do). The state, with
gradients, optimizer and average in float32, takes 17 GB for Stable Diffusion 1 and 51 GB for XL, and activations come
on top. Where a chip has less, divide it over several (docs/scaling.md):

    DIVIDED="--config.train.parallel=fsdp --config.dtype=bfloat16"
    $SD --mode=train --config.data.path=PHOTOS $DIVIDED                                                      # 8 chips
    $SD --mode=train --config.data.path=PHOTOS $DIVIDED --config.train.batch_size=256 --config.train.accumulate=4  # 16

`configs/lora.py` needs less. The run's weights are then used by sample and export with the same --workdir. This was
tried on a small model (docs/results.md), not yet on a published one.

What a run costs, by --mode=check: what a chip holds without activations, and the training at 40 % of its peak.

    published.py --config.checkpoint=sd15 --config.train.parallel=fsdp  v5e:2x4  2.2 GB  0.1 h
    published.py --config.checkpoint=sd21 --config.train.parallel=fsdp  v5e:2x4  2.2 GB  0.3 h
    published.py --config.checkpoint=sdxl --config.train.parallel=fsdp  v5e:2x4  6.5 GB  0.9 h
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
    """arg: not used; there are no presets."""
    if arg:
        raise ValueError(f"published.py has no presets, got {arg!r}; name the model by --config.checkpoint=FOLDER")
    config = common.published("published")
    config.data = common.data("folder", size=0, flip=True)
    config.data.upscale = True
    config.objective = common.objective()
    del config.objective.prediction, config.objective.sigma_data
    config.optimizer = common.optimizer(1e-5, warmup=500)
    config.train = common.train(steps=10_000, batch_size=8, ema=0.9999, every=500)
    config.sample = common.sample(
        ("a photograph of an astronaut riding a horse",), solver="published", steps=25, guidance=7.5
    )
    config.sample.batch_size = 4
    config.eval = common.evaluation(images=100)
    return config
