"""AnoSeg in JAX/Flax: learns to draw anomaly maps from good parts alone."""


class UsageError(ValueError):
    """What a user can mend: each line of the message says what is wrong, where, and what to do."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
