"""Check that a published model fits its configs, and that its outputs equal those of diffusers.

    python -m diffusion_jax.interop.verify FOLDER

Prints each tensor that is missing, unexpected or of the wrong shape. If torch, diffusers and transformers are
installed, prints the largest difference of the output of each top-level block on random input, relative to its largest
value. A pipeline in a single file is only compared with its configs.
"""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np

from diffusion_jax import paths
from diffusion_jax.interop.family import Component, Network
from diffusion_jax.interop.names import differences, from_torch, torch_name
from diffusion_jax.interop.pipeline import LEVELS, read_networks

PEER_PACKAGES = ("torch", "diffusers", "transformers")


def tensor_report(name: str, network: Network) -> list[str]:
    """One line for each tensor that does not fit the network; empty if all fit."""
    kinds = zip(("missing", "unexpected", "misshapen"), differences(network.tensors, network.like), strict=True)
    return [f"{name}: {kind} {tensor}" for kind, tensors in kinds for tensor in tensors]


def block_report(component: Component, network: Network, folder: Path) -> Iterator[tuple[str, str]]:
    """(block, largest relative difference from diffusers), in the order in which diffusers computes them. For a block
    whose output is arranged otherwise, the two shapes.

    folder: of this network, for diffusers to read.
    """
    inputs = component.inputs(network.module)
    variables = from_torch(network.tensors, network.source, network.like)
    outputs = _our_outputs(network.module, variables, inputs, component.depth)
    for block, expected in _diffusers_outputs(component, network, folder, inputs).items():
        if block not in outputs:
            continue
        own = outputs[block]
        if own.shape == expected.shape:
            yield block, f"{np.abs(own - expected).max() / max(np.abs(expected).max(), 1e-30):.1e}"
        else:
            yield block, f"not compared: the shape is {own.shape}, that of diffusers {expected.shape}"


def main(arguments: list[str]) -> int:
    """Exit status: 0 if every tensor fits, 1 if one does not, 2 if the model cannot be read."""
    if len(arguments) != 1:
        print("usage: python -m diffusion_jax.interop.verify FOLDER", file=sys.stderr)
        return 2
    fits = True
    try:
        path = paths.fetched(arguments[0], LEVELS)
        family, networks = read_networks(path)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    compare = path.is_dir() and all(map(find_spec, PEER_PACKAGES))
    for name, network in networks.items():
        mismatches = tensor_report(name, network)
        fits = fits and not mismatches
        print(
            "\n".join(mismatches) or f"{name}: {len(network.tensors)} tensors, all as {network.source} should have them"
        )
        if compare and not mismatches:
            for block, difference in block_report(family.parts[name], network, path / name):
                print(f"{name}: {block:<40} {difference}")
    return 0 if fits else 1


def _our_outputs(module, variables, inputs, depth):
    """Outputs of our modules down to `depth`, by their names in diffusers. Images have channels first."""

    def run(variables, inputs):
        selected = lambda block, _: 0 < len(block.path) <= depth  # noqa: E731
        arguments = [inputs.pop(key) for key in ("x", "t", "ids", "mask") if key in inputs]
        cond = [inputs] if inputs else []
        return module.apply(variables, *arguments, *cond, capture_intermediates=selected, mutable=["intermediates"])[1]

    outputs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.jit(run)(variables, dict(inputs))["intermediates"]):
        block = tuple(key.key for key in path if hasattr(key, "key"))[:-1]
        outputs.setdefault(torch_name((*block, "")).removesuffix("."), _channels_first(np.asarray(leaf)))
    return outputs


def _diffusers_outputs(component, network, folder, inputs):
    """Outputs of all modules in diffusers by name."""
    import torch

    variant = re.search(r"\.(fp16|bf16)\.", Path(network.source).name)
    options = {"variant": variant[1]} if variant else {}
    model_class = getattr(import_module(component.library), component.class_name(network.module))
    model = model_class.from_pretrained(folder, torch_dtype=torch.float32, **options).eval()
    outputs = {}

    def recorder(block):
        def hook(module, arguments, out):
            out = out if isinstance(out, torch.Tensor) else out[0]
            if isinstance(out, torch.Tensor):  # not a list of images, as whole networks of Z-Image return
                outputs[block] = out.float().numpy()

        return hook

    for block, module in model.named_modules():
        module.register_forward_hook(recorder(component.qualified(block)))
    with torch.no_grad():
        component.run(model, {name: torch.tensor(_channels_first(np.asarray(value))) for name, value in inputs.items()})
    return outputs


def _channels_first(array):
    return np.moveaxis(array, -1, 1).copy() if array.ndim == 4 else array


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
