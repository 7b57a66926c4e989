"""What a network is trained to do: `loss(params, frozen, batch, keys) -> (loss, metrics)`, keys (B,), one for each
example.
"""
