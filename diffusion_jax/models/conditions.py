"""What a denoiser reads besides the noisy image."""

from collections.abc import Collection, Mapping

from jaxtyping import PyTree


def check_condition(
    network: str, reads: Mapping[str, bool], cond: Mapping[str, PyTree], optional: Collection[str] = ()
) -> None:
    """Raise for a condition that is not what a network reads.

    network: its name, for messages.
    reads: each leaf that a network of this kind may read -> whether this one does. A text may have a mask.
    optional: leaves that a condition may have or lack.
    """
    if not isinstance(cond, Mapping):
        kind = type(cond).__name__
        raise TypeError(f'{network}: expected a condition as a mapping such as {{"text": ...}}, got {kind}')
    missing = [name for name, is_read in reads.items() if is_read and name not in cond]
    optional = {*optional, *(["mask"] if reads["text"] else [])}
    unknown = [name for name in cond if not (reads.get(name, False) or name in optional)]
    if missing or unknown:
        raise ValueError(
            f"{network}: expected a condition with {', '.join(n for n in reads if reads[n]) or 'nothing'}, "
            f"got {', '.join(sorted(cond)) or 'nothing'}"
        )
