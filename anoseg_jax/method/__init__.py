"""The algorithm: pure functions and Flax modules, their training step, prediction."""
