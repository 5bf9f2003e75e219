"""The report: one self-contained HTML page of a run, made from the files of its folder alone."""

from xgen.report.page import write_report

__all__ = ["write_report"]
