"""TFDS builder of MVTec AD."""
