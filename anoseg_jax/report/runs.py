"""The mean over seeds, by the name that callers outside of `report` use."""

from anoseg_jax.evaluation import results

mean_over_seeds = results.mean_over_seeds
