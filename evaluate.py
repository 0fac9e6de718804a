"""Measure a checkpoint: `python evaluate.py --checkpoint checkpoints/best.pt [--generate]`."""

import sys

from mantrans.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
