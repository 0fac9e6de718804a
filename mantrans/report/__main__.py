"""python -m mantrans.report RUN ..."""

import sys

from mantrans.cli import main

sys.exit(main(["report", *sys.argv[1:]]))
