"""Training records a second that a host reads, beside what chips consume.

    pip install -r requirements-peer.txt
    python -m benchmarks.input --turns 5

First the need: FLOPs of a training step for each record, and the records a second at which slices run at 40 % of their
bfloat16 peak. Then the supply, in shuffled batches of 64, with a thread or a worker for each core:

JPEGs      of three sizes, decoded, resized by Lanczos and cropped to 256 x 256: from a folder by this project, from a
           folder by torch's DataLoader, from an ArrayRecord file by Grain
latents    of 256 x 256 pixels, mirrored too, bfloat16, one version of each drawn: from the cache of this project, from
           one mapped file by torch's DataLoader, from an ArrayRecord file by Grain

The sides take turns, each in a process of its own (`turns.py`), after as many batches that are not measured. Files are
in the system's cache of files. The time of all cores a record changes less with other load than records a second.
"""

import argparse
import datetime
import itertools
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import quick, turns

SIDE, BATCH, UTILISATION = 256, 64, 0.4
LATENT = 2, 32, 32, 8  # versions, height, width, mean and standard deviation of four channels
SIZES = {"256x256": (256, 256), "500x375": (500, 375), "2000x1500": (2000, 1500)}
PEAKS = {"v5e-8": 8 * 197e12, "v6e-8": 8 * 918e12, "8 x H100": 8 * 989e12}  # bfloat16 FLOP/s, as the makers state
PRESETS = "latent_cfg:imagenet256/unet", "latent_cfg:coco256", "cifar10:"
CORES = len(os.sched_getaffinity(0))


def jpegs(folder: Path, size: tuple[int, int], count: int) -> None:
    """Write parts of scikit-learn's two photographs, resized to `size`, as JPEGs and as one file of records."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from sklearn.datasets import load_sample_images

    photographs, rng = [Image.fromarray(image) for image in load_sample_images().images], np.random.default_rng(0)
    (folder / "files").mkdir(parents=True)
    writer = ArrayRecordWriter(str(folder / "records"), "group_size:1")
    for number in range(count):
        left, top = rng.integers(0, (200, 130))
        part = photographs[number % 2].resize(size, Image.Resampling.LANCZOS, box=(left, top, left + 396, top + 297))
        file = folder / "files" / f"{number:05}.jpg"
        part.save(file, quality=92)
        writer.write(file.read_bytes())
    writer.close()


def latents(folder: Path, count: int) -> None:
    """Write random latents as a cache, as an array in one file, and as one file of records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    bits = np.random.default_rng(0).integers(0, 2**15, (count, *LATENT), np.uint16)
    folder.mkdir()
    cache = latent_cache(folder, count, bits)
    cache.build(cache.missing())
    np.save(folder / "latents.npy", bits)
    writer = ArrayRecordWriter(str(folder / "records"), "group_size:1")
    for row in bits:
        writer.write(row.tobytes())
    writer.close()


def latent_cache(folder: Path, count: int, bits: np.ndarray | None = None):
    """The cache of these latents, and of a class for each."""
    import jax.numpy as jnp

    from diffusion_jax.data.cache import Cache
    from diffusion_jax.data.sources import Source

    fields = {
        "latent": lambda batch: bits[batch["number"]].view(jnp.bfloat16),
        "cond": lambda batch: {"label": batch["number"][:, None] % 1000},
    }
    return Cache(Source("latents", count, lambda number: {"number": number}), folder / "cache", {}, fields, BATCH)


def cropped(image: Image.Image) -> np.ndarray:
    """The centre of a picture, as peers decode it with Pillow: resized to cover the square, then cropped."""
    image = image.convert("RGB")
    scale = SIDE / min(image.size)
    width, height = (max(SIDE, round(side * scale)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    whole = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(whole.crop((left, top, left + SIDE, top + SIDE)))


def ours(folder: Path, count: int, of_latents: bool) -> Iterator:
    """Endless batches of this project."""
    from diffusion_jax.data.crops import crop
    from diffusion_jax.data.loader import loader
    from diffusion_jax.data.sources import folder as folder_of_pictures

    if of_latents:
        return loader(latent_cache(folder, count).source(), BATCH, seed=0)
    return loader(folder_of_pictures(folder / "files", side=SIDE), BATCH, seed=0, transform=crop(SIDE, SIDE))


def grain(folder: Path, count: int, of_latents: bool) -> Iterator:
    """The same with Grain alone, one record after the other."""
    import io

    import grain

    def of_record(data: bytes, rng: np.random.Generator) -> np.ndarray:
        if of_latents:
            return np.frombuffer(data, np.uint16).reshape(LATENT)[rng.integers(LATENT[0])]
        return cropped(Image.open(io.BytesIO(data)))

    records = grain.MapDataset.source(grain.sources.ArrayRecordDataSource(str(folder / "records")))
    shuffled = records.seed(0).shuffle().random_map(of_record).repeat()
    options = grain.ReadOptions(num_threads=CORES, prefetch_buffer_size=2 * BATCH)
    return iter(shuffled.to_iter_dataset(options).batch(BATCH))


def torch(folder: Path, count: int, of_latents: bool) -> Iterator:
    """The same with torch's DataLoader."""
    import torch

    class Records(torch.utils.data.Dataset):
        def __init__(self):
            self.rows = np.load(folder / "latents.npy", mmap_mode="r") if of_latents else None
            self.files = sorted((folder / "files").glob("*.jpg"))

        def __len__(self) -> int:
            return count

        def __getitem__(self, index: int):
            if of_latents:
                return torch.from_numpy(self.rows[index, torch.randint(LATENT[0], ()).item()].copy())
            return torch.from_numpy(cropped(Image.open(self.files[index])).copy())

    def endless() -> Iterator:
        records = torch.utils.data.DataLoader(
            Records(), BATCH, shuffle=True, drop_last=True, num_workers=CORES, persistent_workers=True
        )
        while True:
            yield from records

    return endless()


SIDES = {"ours": ours, "torch": torch, "grain": grain}


def serve(side: str, folder: Path, kind: str, count: int, batches: int) -> None:
    """Answer each turn with the seconds of so many batches."""
    records = SIDES[side](folder / kind, count, kind == "latents")
    turns.serve(lambda: [None for _ in itertools.islice(records, batches)], warmups=1)


def flops(preset: str) -> float:
    """FLOPs of a training step for each record, as --mode=check counts them."""
    import importlib

    from ml_collections import FrozenConfigDict

    from diffusion_jax import build
    from diffusion_jax.app import planned
    from diffusion_jax.compilation import planned_for

    module, _, name = preset.partition(":")
    get_config = importlib.import_module(f"configs.{module}").get_config
    config = FrozenConfigDict(get_config(name) if name else get_config())
    with planned_for("tpu"):
        model = build.model.diffusion_model(config, training=True)
        return planned.denoiser(config, model, several_captions=False).flops(devices=1) / config.train.batch_size


def print_needs(presets: tuple[str, ...]) -> None:
    print(f"| preset | GFLOP a record | {' | '.join(f'{name}, records/s' for name in PEAKS)} |")
    print(f"|---|---|{'---|' * len(PEAKS)}")
    for preset in presets:
        count = flops(preset)
        needs = " | ".join(f"{peak * UTILISATION / count:,.0f}" for peak in PEAKS.values())
        print(f"| {preset.strip(':')} | {count / 1e9:.1f} | {needs} |", flush=True)


def print_rates(folder: Path, counts: dict[str, int], batches: dict[str, int], measured_turns: int) -> None:
    columns = "ours, records/s", "torch", "grain", "ours / torch", "ours / grain", "ours, us of all cores a record"
    print(f"\n| records | {' | '.join(columns)} | torch | grain |\n|{'---|' * (len(columns) + 3)}")
    for kind, count in counts.items():
        arguments = ["--folder", str(folder), "--kind", kind, "--count", str(count), "--batches", str(batches[kind])]
        commands = turns.commands("benchmarks.input", SIDES, arguments)
        sides, records = turns.measure(commands, measured_turns), batches[kind] * BATCH
        rates = [f"{records / statistics.median(side.seconds):,.0f}" for side in sides.values()]
        peers = (sides["torch"].seconds, sides["grain"].seconds)
        ratios = [f"{statistics.median(np.divide(peer, sides['ours'].seconds)):.2f}" for peer in peers]
        busy = [f"{1e6 * statistics.median(side.busy) / records:,.0f}" for side in sides.values()]
        print(f"| {kind} | {' | '.join([*rates, *ratios, *busy])} |", flush=True)


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--batches", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options.serve, options.folder, options.kind, options.count, options.batches)

    quick.note(options.quick)
    load = os.getloadavg()[0]
    print(f"{datetime.date.today()}, {CORES} cores, load before the start {load:.1f}\n")
    print_needs(PRESETS[-1:] if options.quick else PRESETS)
    counts = {"256x256": 1024, "500x375": 1024, "2000x1500": 256, "latents": 16384}
    batches = {"256x256": 16, "500x375": 8, "2000x1500": 2, "latents": 256}
    if options.quick:
        counts, batches = {"256x256": 64, "latents": 64}, {"256x256": 1, "latents": 1}
    with tempfile.TemporaryDirectory() as folder:
        for kind, count in counts.items():
            make = latents if kind == "latents" else lambda place, count, kind=kind: jpegs(place, SIZES[kind], count)
            make(Path(folder) / kind, count)
        print_rates(Path(folder), counts, batches, 1 if options.quick else options.turns)


if __name__ == "__main__":
    main()
