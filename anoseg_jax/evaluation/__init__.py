"""What a model is worth: metrics, their evaluation on test images, baselines, other methods."""
