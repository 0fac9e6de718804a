"""python -m mantrans.report RUN ..."""

import sys

from mantrans.report.page import main

sys.exit(main())
