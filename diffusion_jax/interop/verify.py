"""Check that a published model fits its configs, and that its outputs equal those of diffusers.

    python -m diffusion_jax.interop.verify FOLDER

Prints each tensor that is missing, unexpected or of the wrong shape. If torch, diffusers and transformers are
installed, prints the largest difference of the output of each top-level block on random input, relative to its largest
value. A pipeline in a single file is only compared with its configs.
"""

import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.interop.names import differences, from_torch, torch_name
from diffusion_jax.interop.pipeline import TEXT, Network, read_networks

DEPTH = {"unet": 1, "vae": 2} | dict.fromkeys(TEXT, 3)  # depth of the modules that are compared
PEER = ("torch", "diffusers", "transformers")


def tensor_report(name: str, network: Network) -> list[str]:
    """One line for each tensor that does not fit the network; empty if all fit."""
    kinds = zip(("missing", "unexpected", "misshapen"), differences(network.tensors, network.like), strict=True)
    return [f"{name}: {kind} {tensor}" for kind, tensors in kinds for tensor in tensors]


def block_report(name: str, network: Network, folder: Path) -> Iterator[tuple[str, float]]:
    """(block, largest relative difference from diffusers), in the order in which diffusers computes them.

    folder: of this network, for diffusers to read.
    """
    inputs = _inputs(name, network.module)
    variables = from_torch(network.tensors, network.source, network.like)
    ours = _our_outputs(network.module, variables, inputs, DEPTH[name])
    for block, theirs in _peer_outputs(name, network, folder, inputs).items():
        if block in ours:
            yield block, float(np.abs(ours[block] - theirs).max() / max(np.abs(theirs).max(), 1e-30))


def main(arguments: list[str]) -> int:
    """Exit status: 0 if every tensor fits, 1 if one does not, 2 if the model cannot be read."""
    if len(arguments) != 1:
        print("usage: python -m diffusion_jax.interop.verify FOLDER", file=sys.stderr)
        return 2
    path, fits = Path(arguments[0]), True
    try:
        networks = read_networks(path)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    compare = path.is_dir() and all(map(find_spec, PEER))
    for name, network in networks.items():
        wrong = tensor_report(name, network)
        fits = fits and not wrong
        print("\n".join(wrong) or f"{name}: {len(network.tensors)} tensors, all as {network.source} should have them")
        if compare and not wrong:
            for block, difference in block_report(name, network, path / name):
                print(f"{name}: {block:<40} {difference:.1e}")
    return 0 if fits else 1


def _inputs(name, module):
    """Random inputs of a network by argument name."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    if name in TEXT:
        ids = rng.integers(module.vocab_size - 1, size=(1, min(module.max_position_embeddings, 16)))
        return {"ids": jnp.asarray(ids).at[0, -1].set(module.vocab_size - 1)}
    side = 4 * 2 ** (len(module.block_out_channels) - 1)
    if name == "vae":
        return {"x": normal(1, side, side, module.in_channels)}
    inputs = {"x": normal(1, side, side, module.in_channels - module.known_channels), "t": jnp.array([500.0])}
    inputs["text"] = normal(1, 16, module.cross_attention_dim)
    if module.known_channels:
        inputs["known"] = normal(1, side, side, module.known_channels)
    if module.class_embed_type:
        inputs["text_embeds"] = normal(1, module.projection_class_embeddings_input_dim)
    if module.addition_embed_type:
        numbers = min(6, module.projection_class_embeddings_input_dim // module.addition_time_embed_dim)
        width = module.projection_class_embeddings_input_dim - numbers * module.addition_time_embed_dim
        inputs |= {"text_embeds": normal(1, width), "time_ids": 100 * jnp.arange(1.0, numbers + 1)[None]}
    if module.num_class_embeds:
        inputs["label"] = jnp.array([0])
    return inputs


def _our_outputs(module, variables, inputs, depth):
    """Outputs of the modules down to `depth`, by their names in diffusers. Images have channels first."""

    def run(variables, inputs):
        kept = lambda block, _: 0 < len(block.path) <= depth  # noqa: E731
        given = [inputs.pop(key) for key in ("x", "t", "ids") if key in inputs]
        cond = [inputs] if inputs else []
        return module.apply(variables, *given, *cond, capture_intermediates=kept, mutable=["intermediates"])[1]

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(run)(variables, dict(inputs))["intermediates"]):
        block = tuple(key.key for key in path if hasattr(key, "key"))[:-1]
        found.setdefault(torch_name((*block, "")).removesuffix("."), _channels_first(np.asarray(leaf)))
    return found


def _peer_outputs(name, network, folder, inputs):
    """Outputs of all modules in diffusers by name. CLIP's get the prefix that newer versions leave out."""
    import diffusers
    import torch
    import transformers

    variant = re.search(r"\.(fp16|bf16)\.", Path(network.source).name)
    options = {"variant": variant[1]} if variant else {}
    if name in TEXT:
        projected = "WithProjection" if network.module.projection_dim is not None else ""
        kind = getattr(transformers, f"CLIPTextModel{projected}")
    else:
        kind = diffusers.AutoencoderKL if name == "vae" else diffusers.UNet2DConditionModel
    model = kind.from_pretrained(folder, torch_dtype=torch.float32, **options).eval()
    found = {}

    def keep(block):
        def hook(module, arguments, out):
            out = out if isinstance(out, torch.Tensor) else out[0]
            found[block] = out.float().numpy()

        return hook

    for block, module in model.named_modules():
        prefix = "text_model." if name in TEXT and not block.startswith("text_") else ""
        module.register_forward_hook(keep(prefix + block))
    given = {key: torch.tensor(_channels_first(np.asarray(value))) for key, value in inputs.items()}
    with torch.no_grad():
        if name in TEXT:
            model(given["ids"].long())
        elif name == "vae":
            model(given["x"])
        else:
            added = {key: given.pop(key) for key in ("text_embeds", "time_ids") if key in given}
            x = torch.cat([given[key] for key in ("x", "known") if key in given], dim=1)
            labels = given.get("label")
            model(x, given["t"], given["text"], class_labels=labels, added_cond_kwargs=added or None)
    return found


def _channels_first(array):
    return np.moveaxis(array, -1, 1).copy() if array.ndim == 4 else array


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
