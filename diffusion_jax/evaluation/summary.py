"""How a measure of many pictures is reported."""

import numpy as np
from jaxtyping import Bool, Float


def summary(values: Float[np.ndarray, " pictures"] | Bool[np.ndarray, " pictures"]) -> dict[str, float | None]:
    """Mean over pictures and its standard error. For one picture the error is None, because JSON has no NaN."""
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "standard_error": error}
