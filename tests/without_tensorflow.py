"""Importing this makes TensorFlow look as if it was not installed."""

import sys
from importlib.machinery import PathFinder


class WithoutTensorFlow(PathFinder):
    """Finds all modules but TensorFlow's."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """See importlib."""
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorboard"):
            return None
        return super().find_spec(name, path, target)


sys.meta_path[:] = [WithoutTensorFlow if f is PathFinder else f for f in sys.meta_path]
