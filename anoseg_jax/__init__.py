"""AnoSeg in JAX/Flax: learns to draw anomaly maps from good parts alone."""


class UsageError(ValueError):
    """What a user can mend: each line of the message says what is wrong, where, and what to do."""
