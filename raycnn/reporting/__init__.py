"""What a person sees while a verb works, and what is left to look at when it is done.

ProgressLine: one line on standard error.     write_report: one self-contained report.html beside the run.
"""

from raycnn.reporting.page import Picture, train, write_report
from raycnn.reporting.progress import ProgressLine

__all__ = ["Picture", "ProgressLine", "train", "write_report"]
