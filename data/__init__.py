"""Data sets: opening folders of images or TFDS data sets (`sources`), and TFDS builders."""
