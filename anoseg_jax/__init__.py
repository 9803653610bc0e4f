"""AnoSeg in JAX/Flax: learns to draw anomaly maps from good parts alone."""
