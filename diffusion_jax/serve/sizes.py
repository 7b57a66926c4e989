"""How a request of any size is drawn at a size that the model has programs for."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")  # as in OpenAI's API: WIDTHxHEIGHT


def parsed(text: str) -> tuple[int, int]:
    """Height and width of WIDTHxHEIGHT. Raises ValueError for other text."""
    match = SIZE.fullmatch(text)
    if not match:
        raise ValueError(f"expected WIDTHxHEIGHT, got {text[:40]!r}")
    return int(match[2]), int(match[1])


def written(size: tuple[int, int]) -> str:
    """WIDTHxHEIGHT of a height and width."""
    return f"{size[1]}x{size[0]}"


def nearest(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` whose shape is nearest, and of those the one whose area is."""

    def distance(other: tuple[int, int]) -> tuple[float, float]:
        (height, width), (other_height, other_width) = size, other
        shape = abs(math.log(height * other_width / (width * other_height)))
        return round(shape, 6), abs(math.log(height * width / (other_height * other_width)))

    return min(sizes, key=distance)


class Frame(NamedTuple):
    """A request's images within those of the model: in their middle, as large as they fit.

    size: height and width that were asked for, pixels.
    drawn: height and width that are drawn, pixels.
    image, mask: of the request, of its size, or None. Where the mask is False, the image is kept exactly.
    references: reference pictures of the request, of its size.
    """

    size: tuple[int, int]
    drawn: tuple[int, int]
    image: UInt8[np.ndarray, "height width 3"] | None = None
    mask: Bool[np.ndarray, "height width 1"] | None = None
    references: tuple[UInt8[np.ndarray, "height width 3"], ...] = ()

    @property
    def is_resized(self) -> bool:
        """Whether the model draws another size than was asked for."""
        return self.size != self.drawn

    @property
    def about(self) -> str:
        """What is said of it in an answer."""
        return f"drawn at {written(self.drawn)}, a size of this model, and resized to {written(self.size)}"

    def _sides(self) -> tuple[int, int]:
        """Height and width of the request's part of the drawn image."""
        scale = min(drawn / asked for drawn, asked in zip(self.drawn, self.size, strict=True))
        height, width = (max(1, round(scale * side)) for side in self.size)
        return height, width

    def _padding(self) -> list[tuple[int, int]]:
        """Pixels of the drawn image before and after that part, for each axis."""
        free = [whole - part for whole, part in zip(self.drawn, self._sides(), strict=True)]
        return [(pixels // 2, pixels - pixels // 2) for pixels in free]

    def _filled(self, picture: np.ndarray) -> np.ndarray:
        """A picture of its part, its edges continued to fill the drawn size."""
        return np.pad(picture, [*self._padding(), (0, 0)], "edge")

    def entered(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Image and mask as the model gets them. Their edges are continued to fill the drawn size."""
        if not self.is_resized:
            return self.image, self.mask
        image = None if self.image is None else self._filled(_resized(self.image, self._sides()))
        if self.mask is None:
            return image, None
        # every drawn pixel that the mask touches is generated
        mask = _resized(np.float32(self.mask), self._sides(), Image.Resampling.BOX) > 0
        return image, self._filled(mask)

    def entered_references(self) -> tuple[np.ndarray, ...]:
        """The reference pictures as the model gets them, as `entered`."""
        if not self.is_resized:
            return self.references
        return tuple(self._filled(_resized(picture, self._sides())) for picture in self.references)

    def left(self, image: UInt8[np.ndarray, "height width 3"]) -> UInt8[np.ndarray, "asked_height asked_width 3"]:
        """A drawn image as it was asked for."""
        if not self.is_resized:
            return image
        (height, width), ((top, _), (start, _)) = self._sides(), self._padding()
        image = _resized(image[top : top + height, start : start + width], self.size)
        return image if self.mask is None else np.where(self.mask, image, self.image)


def _resized(
    image: np.ndarray, size: tuple[int, int], method: Image.Resampling = Image.Resampling.LANCZOS
) -> np.ndarray:
    channels = [Image.fromarray(image[..., i]).resize(size[::-1], method) for i in range(image.shape[-1])]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)
