"""Show a config's size, work and memory: `python config_summary.py configs/tinystories.yaml`."""

import sys

from mantrans.cli import main

if __name__ == "__main__":
    sys.exit(main(["summary", *sys.argv[1:]]))
