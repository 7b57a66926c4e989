"""Compare Stable Diffusion at full size with diffusers: every network and a guided image, as markdown.

    pip install -r requirements.txt -r requirements-peer.txt
    python -m benchmarks.parity --folder=/tmp/parity

diffusers and transformers ("the peer") create each model with random weights and write it as published, in half
precision. Both sides use these weights and compute in float32. They run one after the other in separate processes, so
that one model at a time is in memory. Each takes up to 9 GB, and a folder 3 GB until it is compared.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import families, quick

BOUND = 2e-5  # largest difference of a network's outputs, in units of the largest output
PIXEL, SHARE = 1 / 255, 0.999  # tolerance of a pixel of an image, and the share of pixels that must be within it
STEPS, GUIDANCE = 20, 7.5
PROMPT, NEGATIVE = "a watercolor of a lighthouse above the sea at dusk", ""
FLAT = 1e-3  # the least standard deviation of an output that is worth comparing
TOKENS = 77
NUM_MERGES = 48894  # of CLIP's vocabulary: with 2 x 256 bytes and two marks 49408 tokens
MARKS = "<|startoftext|>", "<|endoftext|>"

DDIM = families.NOISE | {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": True,
    "timestep_spacing": "leading",
}
DPMPP = families.NOISE | {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "timestep_spacing": "trailing",  # "leading" differs between diffusers' schedulers
}
EOS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # as published; 2 stands for the largest id
CLIP_L = EOS | families.CLIP_L
CLIP_H = EOS | families.CLIP_H
CLIP_BIG_G = EOS | families.CLIP_BIG_G | {"num_hidden_layers": 8}


class Model(NamedTuple):
    """A published model's configuration. narrowed: what was made smaller, for the report.

    unet, autoencoder, scheduler: fields of their config.json. texts: of each text encoder.
    """

    unet: dict
    autoencoder: dict
    texts: tuple[dict, ...]
    scheduler: dict
    narrowed: str


MODELS = {
    "SD 1.5": Model(
        unet=families.UNET,
        autoencoder=families.AUTOENCODER | {"sample_size": 512, "scaling_factor": 0.18215},
        texts=(CLIP_L,),
        scheduler=DDIM,
        narrowed="nothing",
    ),
    "SD 2.1": Model(
        unet=families.UNET
        | {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        autoencoder=families.AUTOENCODER | {"sample_size": 768, "scaling_factor": 0.18215},
        texts=(CLIP_H,),
        scheduler=DDIM | {"prediction_type": "v_prediction"},
        narrowed="nothing",
    ),
    "SDXL": Model(
        unet=families.SDXL_UNET | {"transformer_layers_per_block": (1, 2, 2)},
        autoencoder=families.AUTOENCODER | {"sample_size": 1024, "scaling_factor": 0.13025},
        texts=(CLIP_L, CLIP_BIG_G),
        scheduler=DPMPP,
        narrowed="the transformers of the coarsest level have 2 layers of 10, the second text encoder has 8 of 32",
    ),
}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where models and outputs are written")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--inputs", type=int, default=64, help="side of the latents that the networks are compared on")
    parser.add_argument("--latent", type=int, default=32, help="side of the latents of the guided image")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [f"--inputs={args.inputs}", f"--latent={args.latent}"]
    if args.quick:
        args.models, args.inputs, args.latent, sizes = args.models[-1:], 8, 8, ["--quick"]
    if args.side:
        (name,) = args.models
        model = quick.tiny_model(MODELS[name]) if args.quick else MODELS[name]
        outputs = SIDES[args.side](model, args.folder, inputs(model, args.inputs, args.latent))
        np.savez(args.folder / f"{args.side}.npz", **outputs)
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(f"{name}, {args.side}: {peak / 1e9:.1f} GB of memory at most", file=sys.stderr, flush=True)
        return
    quick.note(args.quick)
    print(_versions(), "\n")
    for name in args.models:
        print(f"{name}: narrowed: {MODELS[name].narrowed}.\n")
    print("| model | output | shape | deviation | largest difference | |\n|---|---|---|---|---|---|", flush=True)
    agree = [_compare(name, args.folder / name.replace(" ", ""), sizes) for name in args.models]
    sys.exit(not all(agree))


def _compare(name: str, folder: Path, sizes: list[str]) -> bool:
    """Run both sides of a model, print a row for each output, and say whether all agree. The model is deleted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.parity", f"--folder={folder}", *sizes, "--models", name]
    for side in SIDES:
        subprocess.run([*command, "--side", side], check=True)
    shutil.rmtree(folder / "model")
    peer_outputs, our_outputs = (np.load(folder / f"{side}.npz") for side in SIDES)
    return all([_row(name, output, our_outputs[output], peer_outputs[output]) for output in peer_outputs.files])


def _row(name: str, output: str, our_output: np.ndarray, peer_output: np.ndarray) -> bool:
    """Print the difference of the outputs. False if they differ or if an output is constant."""
    difference = np.abs(our_output - peer_output)
    if output == "image":
        share = np.mean(difference.max(axis=-1) <= PIXEL)
        ok, text = (
            share >= SHARE,
            f"{255 * difference.max():.4f} / 255; {share:.2%} of pixels within 1 / 255",
        )
    else:
        error = difference.max() / np.abs(peer_output).max()
        ok, text = error <= BOUND, f"{error:.1e}"
    ok = bool(ok and np.std(peer_output) > FLAT and np.all(np.isfinite(our_output)))
    shape = " x ".join(map(str, peer_output.shape))
    print(
        f"| {name} | {output} | {shape} | {np.std(peer_output):.2g} | {text} | {'ok' if ok else 'DIFFERS'} |",
        flush=True,
    )
    return ok


def _versions() -> str:
    libraries = ("diffusers", "transformers", "torch", "jax", "flax", "numpy")
    return f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in libraries)}."


def inputs(model: Model, side: int, latent: int) -> dict[str, np.ndarray]:
    """The inputs of both sides; images have channels last.

    ids: tokens of two prompts. x, t, text, pooled, sizes: a noisy batch of two, its times and conditions.
    pixels, z: for the autoencoder. noise: initial noise of the guided image.
    """
    rng = np.random.default_rng(0)
    ids = np.full((2, TOKENS), 49407, np.int32)
    ids[:, 0], ids[0, 1:60], ids[1, 1:6] = 49406, rng.integers(0, 49406, 59), rng.integers(0, 49406, 5)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "ids": ids,
        "t": np.array([981, 21], np.int32),
        "sizes": np.float32([[1024, 1024, 0, 0, 1024, 1024], [512, 768, 32, 0, 640, 640]]),
        "x": normal(2, side, side, 4),
        "text": normal(2, TOKENS, model.unet["cross_attention_dim"]),
        "pooled": normal(2, 1280),
        "pixels": rng.uniform(-1, 1, (1, 8 * side, 8 * side, 3)).astype(np.float32),
        "z": normal(1, side, side, 4),
        "noise": normal(1, latent, latent, 4),
    }


def peer(model: Model, folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Create and write the model with diffusers, and return its outputs."""
    import torch

    torch.manual_seed(0)
    write_vocabulary(folder / "vocabulary")
    pipeline = _peer_pipeline(model, folder / "vocabulary")
    pipeline.to(dtype=torch.float16).save_pretrained(folder / "model")
    pipeline.to(dtype=torch.float32)
    with torch.no_grad():
        return _peer_features(pipeline, arrays) | _peer_networks(pipeline, arrays) | _peer_image(pipeline, arrays)


def _peer_pipeline(model, vocabulary):
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    diffusers.logging.set_verbosity_error()
    scheduler = dict(model.scheduler)
    parts = {
        "unet": diffusers.UNet2DConditionModel(**model.unet),
        "vae": diffusers.AutoencoderKL(**model.autoencoder),
        "scheduler": getattr(diffusers, scheduler.pop("_class_name"))(**scheduler),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**model.texts[0])),
        "tokenizer": CLIPTokenizer.from_pretrained(vocabulary),
    }
    if len(model.texts) == 1:
        pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
    else:
        second = CLIPTextModelWithProjection(CLIPTextConfig(**model.texts[1]))
        tokenizer = CLIPTokenizer.from_pretrained(vocabulary)
        pipeline = diffusers.StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _peer_features(pipeline, arrays):
    """The outputs of the text encoders."""
    import torch

    features = {}
    for i, name in enumerate(("text_encoder", "text_encoder_2"), 1):
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            out = encoder(torch.tensor(arrays["ids"]).long(), output_hidden_states=True)
            pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
            features |= _named(i, (out.last_hidden_state, out.hidden_states[-2], pooled))
    return features


def _named(i, features):
    kinds = ("tokens", "tokens before the last layer", "vector")
    return {f"text encoder {i}, {kind}": np.asarray(each) for kind, each in zip(kinds, features, strict=True)}


def _peer_networks(pipeline, arrays):
    """The outputs of the U-Net and of the autoencoder, channels last."""
    import torch

    unet, vae = pipeline.unet, pipeline.vae
    added = {"text_embeds": torch.tensor(arrays["pooled"]), "time_ids": torch.tensor(arrays["sizes"])}
    added = added if unet.config.addition_embed_type else None
    t, text = torch.tensor(arrays["t"]), torch.tensor(arrays["text"])
    outputs = {
        "U-Net": unet(_channels_first(arrays["x"]), t, text, added_cond_kwargs=added).sample,
        "encoder, mean and log variance": vae.encode(_channels_first(arrays["pixels"])).latent_dist.parameters,
        "decoder": vae.decode(_channels_first(arrays["z"])).sample,
    }
    return {name: output.numpy().transpose(0, 2, 3, 1) for name, output in outputs.items()}


def _channels_first(images):
    import torch

    return torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _peer_image(pipeline, arrays):
    side = 8 * arrays["noise"].shape[1]
    options = dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="np", height=side, width=side)
    out = pipeline(PROMPT, negative_prompt=NEGATIVE, latents=_channels_first(arrays["noise"]), **options)
    return {"image": out.images}


def ours(model: Model, folder: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Load the model and return its outputs."""
    import jax

    from diffusion_jax.interop import load_pipeline

    published = load_pipeline(folder / "model")
    features = {}
    for i, (module, params) in enumerate(published.text_encoders, 1):
        features |= _named(i, jax.jit(module.apply)(params, arrays["ids"]))
    return features | _our_networks(published, arrays) | {"image": _our_image(published, arrays["noise"])}


def _our_networks(published, arrays):
    import jax

    (unet, unet_params), (vae, vae_params) = published.denoiser, published.autoencoder
    added = {"text_embeds": arrays["pooled"], "time_ids": arrays["sizes"]} if unet.addition_embed_type else {}
    encode, decode = (jax.jit(functools.partial(vae.apply, method=method)) for method in ("encode", "decode"))
    return {
        "U-Net": jax.jit(unet.apply)(unet_params, arrays["x"], arrays["t"], {"text": arrays["text"], **added}),
        "encoder, mean and log variance": encode(vae_params, arrays["pixels"]),
        "decoder": decode(vae_params, arrays["z"]),
    }


def _our_image(published, noise):
    import jax
    import jax.numpy as jnp

    from diffusion_jax.core import solvers
    from diffusion_jax.pipelines import Guidance, from_noise
    from diffusion_jax.pipelines.published import from_published, published_times

    model = from_published(published, size=(8 * noise.shape[1], 8 * noise.shape[2]))
    solver = solvers.ddim if published.scheduler["_class_name"] == "DDIMScheduler" else solvers.dpmpp_2m
    plan = solver(published.schedule, STEPS, spacing=published_times(published, STEPS))
    cond, negative = (model.conditioning.of_prompts([prompt]) for prompt in (PROMPT, NEGATIVE))
    keys = jax.random.split(jax.random.key(0), len(noise))
    image = from_noise(model, jnp.asarray(noise), cond, keys, plan, Guidance(GUIDANCE, negative))
    return np.clip(image / 2 + 0.5, 0, 1)


def write_vocabulary(folder: Path) -> None:
    """A tokenizer of CLIP's kind and size, whose pairs are made up: letters joined up to four at a time."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(exist_ok=True)
    alphabet = sorted(ByteLevel.alphabet())
    merges = list(itertools.islice(_pairs(), NUM_MERGES))
    words = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), *MARKS]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": MARKS[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _pairs() -> Iterator[tuple[str, str]]:
    """(piece, letter): all pieces of one letter with all letters, inside a word and at its end, then of two, …"""
    letters = "abcdefghijklmnopqrstuvwxyz"
    for length in itertools.count(1):
        for piece in map("".join, itertools.product(letters, repeat=length)):
            yield from ((piece, letter + end) for end in ("", "</w>") for letter in letters)


SIDES = {"peer": peer, "ours": ours}

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
