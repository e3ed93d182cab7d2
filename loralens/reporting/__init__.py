"""Reports: what the verbs found about adapters, as one page, as Markdown with pictures, and as JSON."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.reporting.document import Report as Report
    from loralens.reporting.make import make_report as make_report
    from loralens.reporting.writing import write_report as write_report
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
