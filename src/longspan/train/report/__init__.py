"""The HTML report of a run: `write_report(path, ReportData(...))`, one file that opens from disk with no network."""

from __future__ import annotations

from longspan.train.report.data import ReportData
from longspan.train.report.page import render_report, write_report

__all__ = ["ReportData", "render_report", "write_report"]
