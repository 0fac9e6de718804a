"""Imported by the fork server: what each of its children would otherwise do anew, a third of the
time of a small run. Starts no thread, for the server forks."""

from __future__ import annotations

import numpy.ma  # noqa: F401

import mantrans.evaluation.checkpoint
import mantrans.evaluation.perplexity  # noqa: F401
from mantrans.config import Config
from mantrans.report.page import TEMPLATES

Config.from_dict({"training": {"max_steps": 1}})  # builds the schemas of all sections
for template in TEMPLATES.list_templates(["html"]):
    TEMPLATES.get_template(template)
