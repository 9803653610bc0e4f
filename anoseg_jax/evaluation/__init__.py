"""Evaluation: metrics, results of models and of external maps, trivial baselines."""

# The metrics of all tables, in the order of their columns; results.json has their means.
METRICS = ("image_auroc", "pixel_auroc", "pixel_ap", "iou", "pixel_f1_max", "au_pro")
