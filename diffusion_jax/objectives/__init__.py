"""Training objectives: `loss(params, frozen, batch, keys) -> (loss, metrics)`.

keys: (B,), one for each example.
frozen: dict of inputs that are not trained. The training step adds "step", the number of updates so far, and "ema",
  the averaged params.
"""
