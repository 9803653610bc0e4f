"""TFDS builder of a generated data set of industrial parts."""
