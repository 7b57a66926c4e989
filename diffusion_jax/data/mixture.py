"""A mixture: several sources, each drawn as often as its weight says."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from absl import logging

from diffusion_jax.data.crops import original_size
from diffusion_jax.data.sources import Source
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import Record


def mixed(sources: Sequence[Source], weights: Sequence[Fraction]) -> Source:
    """All records of the sources, one source after the other. Training draws from each in its own order.

    A source of small weight goes through few epochs while others go through many; none ends early. Records have what
    all sources have: pictures, captions and labels. If one source has several captions of a record, the others have
    lists of one. Classes with names are the same class in two sources if they have the same name, and are numbered in
    the sorted order of all names. Classes without names are the same if they have the same number. If only some sources
    have classes, or names of classes, the mixture has none, with a warning.

    weights: how often a record of each source is drawn, relative to the others.
    Raises ValueError if some sources have captions and others none: that would train pictures on the empty caption.
    """
    with_captions = [source for source in sources if source.captions]
    for source in sources:
        if with_captions and not source.captions:
            raise ValueError(
                f"{with_captions[0].name} has captions ({with_captions[0].describe(0)}) and {source.name} has none "
                f"({source.describe(0)}): a mixture needs them in all of its sources, or in none"
            )
    num_classes, names = _classes(sources)
    numbers = {name: number for number, name in enumerate(names)}
    keys = ["image", *["caption"] * bool(with_captions), *["label"] * bool(num_classes)]
    has_several = any(isinstance(source.captions[0], tuple) for source in with_captions)
    ends = list(itertools.accumulate(len(source) for source in sources))

    def place(index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(ends, index)
        return sources[number], index - ends[number] + len(sources[number])

    def read(index: int) -> Record:
        source, position = place(index)
        record = source[position]
        renumbered = {"label": numbers[source.classes[record["label"]]]} if names else {}
        return {key: record[key] for key in keys} | renumbered | {"original": original_size(record)}

    def captions(index: int) -> str | tuple[str, ...]:
        source, position = place(index)
        caption = source.captions[position]
        return (caption,) if has_several and isinstance(caption, str) else caption

    def describe(index: int) -> str:
        source, position = place(index)
        return source.describe(position)

    def measure(index: int) -> np.ndarray:
        source, position = place(index)
        return source.measure(position)

    return Source(
        name=" + ".join(source.name for source in sources) + " by names of classes" * bool(names),
        size=ends[-1],
        read=read,
        num_classes=num_classes,
        classes=names,
        captions=Captions(ends[-1], captions) if with_captions else (),
        files=Captions(ends[-1], describe),
        parts=tuple(replace(source.parts[0], weight=weight) for source, weight in zip(sources, weights, strict=True)),
        measure=measure if all(source.measure for source in sources) else None,
    )


def _classes(sources: Sequence[Source]) -> tuple[int, list[str]]:
    """The number of classes, and their names if they have some."""
    with_classes = [source for source in sources if source.num_classes]
    named = [source for source in with_classes if source.classes]
    for what, having in (("classes", with_classes), ("names of classes", named)):
        if lacking := [source for source in sources if having and source not in having]:
            pair = f"{having[0].name} has {what} ({having[0].describe(0)}) and {lacking[0].name} has none"
            logging.warning("mix: classes are not used: %s (%s)", pair, lacking[0].describe(0))
            return 0, []
    names = sorted({name for source in named for name in source.classes})
    return len(names) or max(source.num_classes for source in sources), names
