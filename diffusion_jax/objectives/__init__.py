"""What a network is trained to do: `loss(params, frozen, batch, keys) -> (loss, metrics)`.

keys: (B,), one for each example. frozen: what the loss reads and training leaves alone, a dict; the training step adds
"step", the number of updates so far, and "ema", the averaged params.
"""
