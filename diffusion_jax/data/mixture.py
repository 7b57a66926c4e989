"""A mixture: several sources, each drawn as often as its weight says."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

from diffusion_jax.data.crops import original_size
from diffusion_jax.data.sources import Source
from diffusion_jax.data.tables import Captions
from diffusion_jax.data.transforms import Record


def mixed(sources: Sequence[Source], weights: Sequence[Fraction]) -> Source:
    """All records of the sources, one source after the other. Training draws from each in its own order.

    A source of small weight goes through few epochs while others go through many; none ends early. Records have what
    all sources have: pictures, captions, and labels of as many classes. If one source has several captions of a record,
    the others have lists of one.

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
    counts = {source.num_classes for source in sources}
    num_classes = counts.pop() if len(counts) == 1 else 0
    keys = ["image", *["caption"] * bool(with_captions), *["label"] * bool(num_classes)]
    has_several = any(isinstance(source.captions[0], tuple) for source in with_captions)
    ends = list(itertools.accumulate(len(source) for source in sources))

    def place(index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(ends, index)
        return sources[number], index - ends[number] + len(sources[number])

    def read(index: int) -> Record:
        source, position = place(index)
        record = source[position]
        return {key: record[key] for key in keys} | {"original": original_size(record)}

    def captions(index: int) -> str | tuple[str, ...]:
        source, position = place(index)
        caption = source.captions[position]
        return (caption,) if has_several and isinstance(caption, str) else caption

    def describe(index: int) -> str:
        source, position = place(index)
        return source.describe(position)

    return Source(
        name=" + ".join(source.name for source in sources),
        size=ends[-1],
        read=read,
        num_classes=num_classes,
        captions=Captions(ends[-1], captions) if with_captions else (),
        files=Captions(ends[-1], describe),
        parts=tuple(replace(source.parts[0], weight=weight) for source, weight in zip(sources, weights, strict=True)),
    )
