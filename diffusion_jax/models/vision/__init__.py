"""Image encoders, as features for evaluation and losses."""
