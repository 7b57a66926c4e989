"""Measure the quality of a model on held-out data."""
