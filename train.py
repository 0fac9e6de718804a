"""Train a model: `python train.py [--config configs/tinystories.yaml]`."""

import sys

from mantrans.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
