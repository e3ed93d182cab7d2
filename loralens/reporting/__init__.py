"""Reports: what the verbs found about adapters, as one page, as Markdown with pictures, and as JSON."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.reporting.document import Report
    from loralens.reporting.make import make_report
    from loralens.reporting.writing import write_report

__all__ = [
    "Report",
    "make_report",
    "write_report",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Report": "document",
        "make_report": "make",
        "write_report": "writing",
    },
)
