"""Trains and evaluates AnoSeg: `python launch.py --config=configs/mvtec.py --workdir=W`."""

import sys

from anoseg_jax import cli

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv))
