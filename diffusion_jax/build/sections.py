"""The sections of a config: the default, the range and the meaning of every field, stated once.

A section is a table of fields by name. `configs/common.py` makes configs from these tables; `fields.check` compares a
config with them.
"""

import functools
from dataclasses import dataclass
from typing import Any

from ml_collections.config_dict import placeholder

from diffusion_jax.build.ranges import (
    Check,
    each,
    flag,
    fraction,
    number,
    optional,
    pattern,
    positive,
    text,
    whole,
    zero_or,
)

SEEDS = 2**32  # seeds must be smaller: JAX and numpy keep them in 32 bits
UPDATES = 2**31 - 1  # the training step is counted in 32 bits
STEPS = 100_000  # more rows of a plan, or steps of a schedule, only fill the memory
IMAGES = 1_000_000  # images of a prompt


@dataclass(frozen=True)
class Field:
    """One field of a section.

    default: its value, or a function without arguments that makes it.
    check: what a value must be.
    doc: what it means.
    """

    default: Any
    check: Check
    doc: str


seed = whole(0, SEEDS - 1)
side = whole(8, 8192)

RUN = {
    "name": Field("", text, "Name of the model. Its work directory is runs/NAME by default."),
    "seed": Field(0, seed, "Seed of initial weights, the order of the data and all noise in training."),
}

TRAINED = {
    "weights": Field(
        "", text, "The model to use while the work directory has no checkpoint: a folder of --mode=export, or empty."
    ),
    "init": Field("", text, "A U-Net folder of diffusers' format to start from, whole or without the outer levels."),
    "teacher": Field("", text, "Few steps: the trained model to start and learn from, a work directory or export."),
}

PUBLISHED = {
    "checkpoint": Field("", text, "A published model: a diffusers folder or a .safetensors file."),
    "dtype": Field(
        "float32",
        text,
        "Compute type of a checkpoint's networks: float32, or bfloat16 for TPU and GPU.",
    ),
    "prediction": Field("", text, "eps, v or x0, if the checkpoint does not contain it; flow for SiT."),
    "denoiser": Field("", text, "A file with a U-Net or transformer alone, in place of the checkpoint's own."),
    "tokenizers": Field("", text, "A folder with tokenizers, for a checkpoint of one file."),
    "vae": Field("", text, "A folder with an autoencoder, for a checkpoint of one file that has none."),
    "allow_pickle": Field(False, flag, "Also read .bin, .ckpt and .pt files. Only tensors are read from them."),
    "safety_checker": Field(True, flag, "Hold back images that the checkpoint's safety checker flags, if it has one."),
    "loras": Field((), each(text), "Files that are added to the weights, each FILE or FILE@SCALE."),
    "embeddings": Field(
        (), each(text), "Files of learned words (textual inversion), each FILE or FILE@WORD to call its word WORD."
    ),
    "clip_skip": Field(
        0,
        whole(0),
        "Last layers of the text encoder to leave out, as diffusers counts; 1 is clip skip 2 of web interfaces.",
    ),
    "remat": Field(True, flag, "Recompute activations in the backward pass instead of keeping them."),
    "scan": Field(False, flag, "Compile one block of a transformer for all of them."),
}

DATA = {
    "source": Field(
        "digits",
        text,
        "emoji, digits, folder (then path), folder:PATH, tfds:NAME; shards, tar:FILES, parquet:FILES or "
        "array_record:FILES, with * in names and {split} for the split; or several, mix:0.7*SOURCE + 0.3*SOURCE.",
    ),
    "path": Field("", text, "The folder of source=folder."),
    "styles": Field((), each(text), "The styles of source=emoji; empty for all."),
    "concepts": Field(
        (), each(text), "Emoji of source=emoji by name, or simple, everyday: lists of them; empty for all."
    ),
    "data_dir": Field("", text, "Where TFDS keeps data sets; empty for its default."),
    "cache": Field(
        "",
        text,
        "A local folder for outputs of frozen networks, and for lists and copies of data; empty for WORKDIR/cache (on "
        "a bucket a local one), and ~/.cache/diffusion_jax/data.",
    ),
    "cache_gb": Field(
        50.0, number(0), "Disk space in GB for shards that are copied from a bucket or unpacked from Parquet."
    ),
    "size": Field(64, zero_or(side), "Pixels a side of training images; 0 for the size of config.checkpoint."),
    "buckets": Field(
        0,
        whole(0),
        "How many wider shapes than the square pictures are trained in, and as many taller ones, all of about size * "
        "size pixels, each picture in the nearest; 0 for the square alone.",
    ),
    "random_crop": Field(False, flag, "Crop at a random place, else at the centre."),
    "crops": Field(4, whole(1), "Random crops of each image in the cache of latents."),
    "flip": Field(False, flag, "Mirror half of the images."),
    "upscale": Field(False, flag, "Enlarge images smaller than size, else they are skipped."),
}

SPLITS = {
    "train": Field("train", text, "The source's name of the split to train on."),
    "validation": Field("validation", text, "Its name of the held-out split."),
    "first_stage": Field("train", text, "Its name of the split to train a first stage on."),
}

CONDITION = {
    "kind": Field("none", text, "none, class or text."),
    "num_classes": Field(10, whole(1), "For kind=class: the number of classes of the source."),
    "encoders": Field(
        ("minilm",),
        each(text),
        "For kind=text: minilm, or folders of text encoders (CLIP, T5, UMT5, BERT, Qwen3) as transformers saves them, "
        "their tokenizer in them or beside them. FOLDER@layer=penultimate,norm=True,length=77,pooled=True sets for "
        "one which layer it gives (last, penultimate, or a number of layers after it), whether its final norm follows, "
        "its tokens and whether its vector joins.",
    ),
    "join": Field("channels", text, "For several encoders: channels, token by token, or tokens, one after the other."),
    "null": Field("prompt", text, "No condition: prompt, the empty one, or zeros."),
    "dtype": Field("float32", text, "Compute type of the encoders: float32, or bfloat16 for TPU and GPU."),
    "allow_pickle": Field(False, flag, "Also read .bin files of encoders. Only tensors are read from them."),
    "copy": Field(False, flag, "--mode=export copies the encoders of folders, with their tokenizers, into the export."),
    "length": Field(32, whole(3, 512), "For kind=text: tokens of a prompt, with its start and end token."),
    "pooled": Field(False, flag, "For kind=text: also one vector for the whole prompt."),
}

AUTOENCODER = {
    "kind": Field("identity", text, "identity (pixels) or kl (latents)."),
    "checkpoint": Field("", text, "A VAE folder in the format of diffusers, instead of training one."),
    "init": Field("", text, "Another such folder: training starts from its weights."),
    "flip": Field(True, flag, "Mirror half of the images, for this stage alone."),
}

LOSS = {
    "name": Field("autoencoding", text, "What is trained."),
    "l1": Field(1.0, number(0), "Weight of the absolute error."),
    "l2": Field(2.0, number(0), "Weight of the squared error."),
    "edges": Field(0.0, number(0), "Weight of the error of differences between neighbouring pixels."),
    "perceptual": Field(0.1, number(0), "Weight of LPIPS; 0 for none."),
    "perceptual_net": Field("alex", text, "The network of LPIPS."),
    "kl": Field(1e-6, number(0), "Weight of the divergence of latents from the standard normal distribution."),
    "adversarial": Field(0.0, number(0), "Weight of the discriminator; 0 for none."),
}

SCHEDULE = {
    "name": Field("cosine", text, "linear, scaled_linear, cosine, sigmoid, of T steps; flow, edm, of continuous time."),
    "T": Field(1000, whole(1, STEPS), "Number of steps, if time is not continuous."),
    "shift": Field(1.0, positive, "For flow: above 1, more of the time is at high noise."),
    "sigma_min": Field(0.002, positive, "For edm: the least noise."),
    "sigma_max": Field(80.0, positive, "For edm: the most noise."),
    "zero_terminal_snr": Field(False, flag, "Rescale so that the last step is pure noise; not for edm and flow."),
}

OBJECTIVE = {
    "name": Field("denoising", text, "What is trained: denoising, or a method of docs/few_steps.md."),
    "prediction": Field("v", text, "What the network predicts: eps, x0, v, flow or edm. A checkpoint has its own."),
    "sigma_data": Field(0.5, positive, "For prediction=edm: the standard deviation of the data."),
    "weight": Field(
        "",
        text,
        "Weight of the error at each noise level: uniform, relative, inverse_noise, velocity, min_snr or truncated; "
        "empty: uniform, and for few steps that of the method.",
    ),
    "levels": Field(
        "",
        text,
        "Noise levels in training: uniform, even, laplace, lognormal, lognormal_ect, lognormal_scm, lognormal_jit, "
        "logit_normal; "
        "empty: lognormal on edm, else uniform, and for few steps those of the method.",
    ),
    "drop": Field(0.1, number(0, 1), "Probability of training without the condition, for guidance."),
    "segments": Field(16, whole(1, 1000), "Distillation: steps of the student, each as two of its teacher."),
    "scale": Field(1.0, number(0), "Of the guidance that is built in; the most, if model.time_cond_proj_dim."),
    "taught": Field(False, flag, "Few steps from data: follow the teacher's way, guided, instead of the straight one."),
    "warm_up": Field(0.5, number(0, 1), "continuous_consistency: part of training until the derivative is all in."),
    "shrinks": Field(8.0, number(0, 30), "consistency_training, soflow: how often the gap of the target is halved."),
    "plain": Field(0.0, number(0, 1), "Few steps: part of the examples with plain regression."),
    "robust": Field(0.0, number(0, 1), "Few steps: how much less large errors count."),
}

OPTIMIZER = {
    "kind": Field("adamw", text, "adamw, or muon: fewer steps, each of them longer (Jordan 2024)."),
    "learning_rate": Field(1e-4, positive, "The highest learning rate, after warm-up."),
    "warmup": Field(0, whole(0, UPDATES), "Steps from 0 up to the learning rate."),
    "decay": Field("constant", text, "constant, or cosine: down to 0 at the last step."),
    "b1": Field(0.9, fraction, "AdamW: decay of the mean of gradients."),
    "b2": Field(0.999, fraction, "AdamW: decay of the mean of squared gradients."),
    "weight_decay": Field(0.0, number(0), "Weight decay."),
    "clip": Field(1.0, positive, "The largest global norm of a gradient."),
}

TRAIN = {
    "steps": Field(1000, whole(1, UPDATES), "Updates in all."),
    "batch_size": Field(64, whole(1), "Records of one update, over all devices."),
    "accumulate": Field(1, whole(1), "Micro-batches of each device's share of the batch."),
    "parallel": Field(
        "pmap",
        text,
        "pmap: all weights on each device. fsdp, fsdp=N: divided over groups of devices (docs/scaling.md).",
    ),
    "ema": Field(0.999, fraction, "Decay of the average of the weights."),
    "log_every": Field(20, whole(1), "Steps between lines of metrics.jsonl."),
    "checkpoint_every": Field(500, whole(1), "Steps between checkpoints."),
    "snapshot_every": Field(500, whole(1), "Steps between sample sheets."),
    "post_hoc": Field(False, flag, "At each checkpoint, save averages for eval.averages (Karras et al. 2024)."),
    "max_bad_steps": Field(20, whole(1), "Updates in a row with a loss that is not finite before the run ends."),
}

# the functions in `core` check the bounds of rescale and dynamic_threshold
SAMPLE = {
    "prompts": Field((), each(text), "What to generate."),
    "height": Field(0, zero_or(side), "In pixels; 0 for data.size."),
    "width": Field(0, zero_or(side), "In pixels; 0 for data.size."),
    "solver": Field("dpmpp_2m", text, "A solver of docs/samplers.md; published: the one a checkpoint comes with."),
    "steps": Field(20, whole(1, STEPS), "Steps of the solver, at most those of the schedule."),
    "order": Field(functools.partial(placeholder, int), optional(whole(1)), "Order; None for the solver's."),
    "eta": Field(functools.partial(placeholder, float), optional(number(0)), "Added noise; None for the solver's."),
    "floor": Field(
        functools.partial(placeholder, float),
        optional(number(0, 1)),
        "flow_heun: least noise by which its velocity divides; None for 0.",
    ),
    "spacing": Field(
        "",
        text,
        "Spacing of the steps; empty: karras on edm, but for consistency and models of few steps, else trailing; "
        "published: the times of its authors.",
    ),
    "guidance": Field(1.0, number(0), "Scale of classifier-free guidance; 1 for none."),
    "negative_prompt": Field("", text, "What to move away from; empty for no condition."),
    "rescale": Field(0.0, number(), "phi in [0, 1]: how much of the unguided image's contrast is kept."),
    "guidance_interval": Field((0.0, 0.0), each(number(), 2), "(low, high) in sigma / alpha; (0, 0) for everywhere."),
    "cfg_pp": Field(False, flag, "CFG++, with guidance in [0, 1]."),
    "dynamic_threshold": Field(0.0, number(), "Percentile in (0, 1], for models of pixels; 0 for none."),
    "image": Field("", text, "Path of a picture to start from."),
    "strength": Field(0.6, number(0, 1), "How much of the image changes."),
    "mask": Field("", text, "Path of a mask of its size, white or opaque where the image is generated."),
    "references": Field((), each(text), "Paths of pictures that the prompts refer to, for FLUX.2 klein."),
    "resample": Field(1, whole(1, 100), "RePaint's repeats of each step."),
    "tile": Field(0, whole(0), "Decode large images in tiles with this side in pixels; 0 for whole images."),
    "in_turns": Field(
        functools.partial(placeholder, bool),
        optional(flag),
        "Keep only the network that is in use on the device; None: if they take most of its memory (docs/scaling.md).",
    ),
    "num_images": Field(1, whole(1, IMAGES), "Number of images for each prompt."),
    "batch_size": Field(64, whole(1), "Images generated at once."),
    "seed": Field(0, seed, "Seed of a prompt's first image; the others count up from it."),
}

EVAL = {
    "measures": Field(
        ("likelihood",), each(text), "What to measure: likelihood, distances, scenes (of the data source emoji)."
    ),
    "images": Field(1000, whole(1), "How many held-out images are measured, or generated; fewer if there are fewer."),
    "split": Field("validation", text, "Distances: data.splits name of the held-out images; train: some of these."),
    "reference": Field(5000, whole(0), "Distances: how many training images they are to; 0 for all."),
    "networks": Field(
        ("vgg16", "alexnet"),
        each(text),
        "Distances: in the features of vgg16, alexnet, pixels, inception:FILE, encoder:FOLDER.",
    ),
    "statistics": Field((), each(text), "Distances: .npz of the reference, one for each network; empty to compute."),
    "steps": Field(25, whole(1, STEPS), "Steps of the flow, four evaluations each."),
    "probes": Field(1, whole(1, 1000), "Probes of the flow's divergence."),
    "terms": Field(100, whole(0), "How many of the T terms of the bound to evaluate; 0 for all."),
    "concepts": Field(500, whole(1), "How many names are asked for, two pictures each; fewer if there are fewer."),
    "cases": Field(200, whole(1), "How many scenes of each other kind are asked for; fewer if there are fewer."),
    "scales": Field((), each(number(0)), "Guidance scales of generated images; empty for sample.guidance."),
    "network": Field("alex", text, "The classifier in whose features drawings are compared: alex or vgg."),
    "averages": Field((), each(number()), "Lengths of averages of the weights to measure, parts of the run."),
    "along": Field(False, flag, "Measure the one average of eval.averages at every checkpoint of the run."),
    "beside": Field((), each(text), "Work directories whose reports stand beside this one in report.html."),
    "batch_size": Field(64, whole(1), "Images whose likelihood is measured at once."),
    "seed": Field(0, seed, "Seed of the order of the images, of the scenes and all noise."),
}

SERVE = {
    "host": Field("127.0.0.1", text, "Address to listen on; any other than the loopback needs a token_file."),
    "port": Field(7860, whole(0, 65535), "Port to listen on; 0 for any free one."),
    "token_file": Field("", text, "File with the token that clients must send; empty for none."),
    "hosts": Field(
        (), each(text), "Further names by which clients call the server without a token, such as host.docker.internal."
    ),
    "batch_size": Field(4, whole(1, 256), "Images drawn at once. Smaller batches are filled up to it."),
    "queue": Field(64, whole(1), "Requests that may wait; more are refused."),
    "max_images": Field(16, whole(1, 256), "The most images of a request."),
    "max_steps": Field(150, whole(1, 1000), "The most steps of a request."),
    "max_side": Field(2048, side, "The largest height and width of a request, pixels."),
    "sizes": Field(
        (),
        each(text),
        "Up to 16 more sizes to draw at, each WIDTHxHEIGHT; others are drawn at the nearest and resized.",
    ),
    "max_upload": Field(20_000_000, whole(1000), "Bytes of a request."),
    "max_pixels": Field(16_000_000, whole(64), "Pixels of an uploaded picture."),
    "save": Field("", text, "Folder that also gets every picture, beside the answer; empty for none."),
    "live_weights": Field(
        "", text, "A model of few steps whose teacher is the one that is served: it draws the live canvas."
    ),
    "live_steps": Field(
        8, whole(1, 1000), "Steps of the live canvas, at most those of its model, unless the client says otherwise."
    ),
}

LORA = {
    "rank": Field(8, whole(1, 4096), "Rank of the updates."),
    "alpha": Field(8.0, positive, "The updates are alpha / rank up down."),
    "targets": Field(
        r"(attn[12]?|attention)/(to_(q|k|v|out(_0)?|qkv_mlp_proj|add_out)|add_[qkv]_proj)",
        pattern,
        "A regular expression: the paths of the updated maps end in it.",
    ),
}
