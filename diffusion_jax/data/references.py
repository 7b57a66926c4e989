"""Reference pictures: which ones a model reads beside its prompt, and in which size."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion_jax.data.crops import stretched


class References(NamedTuple):
    """The reference pictures that a model reads.

    most: how many. 0 for a model that reads none.
    area: pixels. A larger picture is resized to about this area.
    side: the least height and width, pixels.
    ratio: of the sides, the largest.
    """

    most: int = 0
    area: int = 0
    side: int = 0
    ratio: float = 1.0

    def check(self, count: int) -> None:
        """Raise ValueError for as many pictures as a model does not read."""
        if count > self.most:
            reads = f"reads at most {self.most} reference pictures" if self.most else "reads no reference pictures"
            raise ValueError(f"this model {reads}, got {count}: leave out those that it cannot read")

    def fitted(self, picture: UInt8[np.ndarray, "height width 3"], cell: int) -> UInt8[np.ndarray, "rows columns 3"]:
        """The picture in a size that the model reads: resized if it is too large, and cropped at its centre.

        cell: height and width become multiples of it.
        Raises ValueError for a picture that is too small or too elongated.
        """
        height, width = picture.shape[:2]
        least = max(self.side, cell)
        if min(height, width) < least or max(height, width) > self.ratio * min(height, width):
            raise ValueError(
                f"expected a reference picture of at least {least}x{least} pixels, with sides of at most "
                f"{self.ratio:g} to 1, got {width}x{height}"
            )
        if height * width > self.area:
            scale = math.sqrt(self.area / (width * height))
            height, width = int(height * scale), int(width * scale)
            picture = stretched(picture, (height, width))
        rows, columns = height // cell * cell, width // cell * cell
        top, left = (height - rows) // 2, (width - columns) // 2
        return picture[top : top + rows, left : left + columns]
