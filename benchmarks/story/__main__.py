"""What each choice in diffusion does, measured: one table and one plot for each command.

    python -m benchmarks.story objectives     # schedule, prediction and weight of the loss: digits, three seeds
    python -m benchmarks.story seeds          # ten seeds of training: digits
    python -m benchmarks.story solvers        # solver and steps: digits
    python -m benchmarks.story guidance       # guidance scale, in an interval, rescaled: the demo weights
    python -m benchmarks.story latents        # latents against pixels, as many seconds of training: emoji
    python -m benchmarks.story gan            # coverage, against a GAN of as many weights, in as many seconds
    python -m benchmarks.story ladder         # methods of few steps, beside their teacher: digits, three seeds
    python -m benchmarks.story fast           # the student of the demo at few network calls, beside the demo weights
    python -m benchmarks.story networks       # the U-Net beside transformers of as many FLOPs, parameters, minutes:
                                              # digits, three seeds
    python -m benchmarks.story emoji_networks    # the same of 64 x 64 emoji in latents

Each trains and measures what it needs in runs/story, where a second call finds it again; prints a table in Markdown,
and draws docs/story_TABLE.png. Distances are Frechet distances over those of as many held-out pictures; +- is the
standard deviation over seeds, or with one seed the standard error. AlexNet's features of digits enlarged 28 times say
little by themselves, so digits are measured in their pixels too.
"""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from absl import logging

from benchmarks import quick
from benchmarks.story import digits, emoji, networks
from benchmarks.story.runs import Runs
from diffusion_jax.compilation import configure

TABLES: dict[str, Callable[[Runs, plt.Axes], None]] = {
    "objectives": digits.objectives,
    "seeds": digits.seeds,
    "solvers": digits.solvers,
    "guidance": emoji.guidance,
    "latents": emoji.latents,
    "gan": digits.gan,
    "ladder": digits.ladder,
    "fast": emoji.fast,
    "networks": networks.of_digits,
    "emoji_networks": networks.of_emoji,
}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("table", choices=TABLES)
    flags = parser.parse_args()
    quick.note(flags.quick)
    logging.set_verbosity(logging.INFO)
    configure(low_memory=False)
    runs = Runs(Path("runs") / ("story_quick" if flags.quick else "story"), flags.quick)
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    TABLES[flags.table](runs, axes)
    figure.savefig(quick.picture(f"story_{flags.table}.png", flags.quick), dpi=100)


if __name__ == "__main__":
    main()
