"""Which variables training changes: all of them, or only low-rank updates (`models.lora`)."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Key, PyTree

from diffusion_jax.models import lora as low_rank


class Adapter(NamedTuple):
    """How variables are divided into trained and frozen ones.

    split: (variables, key) -> (trained, rest). The initial trained variables, and the frozen ones.
    join: (trained, rest) -> the variables that the network uses.
    """

    split: Callable[[PyTree, Key[Array, ""]], tuple[PyTree, PyTree]]
    join: Callable[[PyTree, PyTree], PyTree]


WHOLE = Adapter(lambda variables, key: (variables, {}), lambda trained, rest: trained)


def lora(rank: int, scale: float, targets: str = low_rank.ATTENTION) -> Adapter:
    """Train only low-rank updates.

    rank, targets: as in `models.lora.init`, with the same errors.
    scale: alpha / rank.
    """
    return Adapter(
        lambda variables, key: (low_rank.init(variables, rank, key, targets), variables),
        lambda trained, rest: low_rank.with_updates(rest, trained, scale),
    )
