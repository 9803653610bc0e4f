"""Training that ends as if its process was killed."""

import itertools

from anoseg_jax.images import batches


class Killed(Exception):
    """Stands for the end of the process: nothing after it runs."""


def killed_after(steps):
    """Returns a `make_batches` that ends the training after so many steps."""

    def make_batches(arrays, start, **options):
        yield from itertools.islice(batches.train_batches(arrays, start, **options), steps)
        raise Killed

    return make_batches
