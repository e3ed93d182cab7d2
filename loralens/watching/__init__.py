"""Watching adapters while any trainer trains them: live views, measures of every look, warnings, and exact merging."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.watching.view import live as live
else:
    # Imported on first use, since torch takes a second to import. No trainer is imported until its callback is used.
    __all__, __getattr__, __dir__ = lazy_exports(__name__, {"view": ["live"]})
