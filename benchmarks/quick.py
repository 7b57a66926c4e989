"""--quick, an option of every benchmark: the same code on a tiny size, in seconds. It measures nothing, and says so."""

import argparse
from pathlib import Path

HELP = "a tiny size that takes seconds: shows that the benchmark works, measures nothing"
ROOT = Path(__file__).parent.parent
TINY = {  # fields of config.json files
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
LEVELS = "block_out_channels", "down_block_types", "up_block_types"


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser for a benchmark with this docstring, with --quick."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--quick", action="store_true", help=HELP)
    return result


def note(quick: bool) -> None:
    """Print, in a quick trial, that it is one."""
    if quick:
        print("Quick trial on a tiny size: no measurement.\n", flush=True)


def tiny(network: dict, **fields) -> dict:
    """The config.json of a network, made small: few channels and layers, as many levels. fields: changed besides."""
    small = TINY | {"block_out_channels": (32,) * len(network.get("block_out_channels", ()))}
    return {name: small.get(name, value) for name, value in network.items()} | fields


def tiny_unet(network: dict, **fields) -> dict:
    """The same for a U-Net, of whose levels the first and the last stay."""
    ends = {name: (network[name][0], network[name][-1]) for name in LEVELS}
    return tiny(network | ends, **fields)


def tiny_model(model):
    """A named tuple with the fields unet, texts and autoencoder, with all of these networks made small."""
    texts = tuple(tiny(text) for text in model.texts)
    unet = tiny_unet(model.unet, cross_attention_dim=sum(text["hidden_size"] for text in texts))
    return model._replace(unet=unet, texts=texts, autoencoder=tiny(model.autoencoder))


def picture(name: str, quick: bool) -> Path:
    """Where a benchmark draws its picture: docs/, but a quick trial runs/."""
    folder = ROOT / ("runs" if quick else "docs")
    folder.mkdir(exist_ok=True)
    return folder / name
