"""Pages, pictures and comparisons, from the result files alone."""
