"""Data sets: the reader of the MVTec AD folder layout and the TFDS builders."""
