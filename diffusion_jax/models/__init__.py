"""Networks in Flax Linen; submodules bear the names of the checkpoints that exist."""
