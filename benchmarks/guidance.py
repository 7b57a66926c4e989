"""What guidance does, from the report of a model of emoji scenes: plots docs/guidance.png.

    pip install -r requirements-dev.txt matplotlib
    python main.py --config=configs/latent_cfg.py:full --mode=eval --config.eval.measures="('scenes',)" \
        --config.eval.scales=1,2,3,5,8
    python -m benchmarks.guidance runs/emoji/eval/report.json

Left, the part of pictures in which a program finds what was asked for. Right, the LPIPS distance between two pictures
of a caption. Bars are standard errors.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks import quick

CURVES = {  # kind and part -> label
    ("names", "object"): "object, by name",
    ("held-out colours", "object"): "object, in a colour never seen on it",
    ("held-out colours", "colour"): "colour never seen on the object",
    ("grounds", "ground"): "colour of the ground",
    ("places", "place"): "place",
    ("counts", "count"): "number of copies",
}


def main() -> None:
    parser = quick.parser(__doc__)
    parser.add_argument("report", type=Path, help="eval/report.json of a model of emoji scenes")
    flags = parser.parse_args()
    quick.note(flags.quick)
    scenes = json.loads(flags.report.read_text())["scenes"]
    of_scale = {float(name.removeprefix("guidance ")): kinds for name, kinds in scenes.items()}
    figure, (correctness, diversity) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    for (kind, part), label in CURVES.items():
        _plot(correctness, {scale: kinds[kind]["generated"][part] for scale, kinds in of_scale.items()}, label)
    _plot(diversity, {scale: kinds["names"]["diversity"] for scale, kinds in of_scale.items()}, "between two pictures")
    correctness.set(xlabel="guidance scale", ylabel="part of the pictures", ylim=(0, 1.02))
    diversity.set(xlabel="guidance scale", ylabel="LPIPS (AlexNet)", ylim=(0, None))
    correctness.legend(fontsize="small")
    figure.savefig(quick.picture("guidance.png", flags.quick), dpi=100)


def _plot(axes: plt.Axes, summaries: dict[float, dict], label: str) -> None:
    means, errors = ([summary[name] for summary in summaries.values()] for name in ("mean", "standard_error"))
    axes.errorbar(list(summaries), means, errors, marker="o", capsize=3, label=label)


if __name__ == "__main__":
    main()
