"""Configurations: `python launch.py --config=configs/NAME.py`."""
