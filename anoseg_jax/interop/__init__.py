"""Weights and training steps for other implementations."""
