"""What a config asks for, before it is run: `python config_summary.py configs/tinystories.yaml`."""

import sys

from mantrans.cli import main

if __name__ == "__main__":
    sys.exit(main(["summary", *sys.argv[1:]]))
