"""How good a model is, measured on held-out data."""
