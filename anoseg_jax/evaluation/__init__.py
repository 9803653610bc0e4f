"""Evaluation: metrics, results of models and of external maps, trivial baselines."""
