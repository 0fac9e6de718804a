"""python -m mantrans.report RUN ..."""

from mantrans.report.page import main

main()
