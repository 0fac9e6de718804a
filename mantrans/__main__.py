"""python -m mantrans COMMAND ..."""

import sys

from mantrans.cli import main

sys.exit(main())
