"""What a program that reads adapters would reject or ignore of one."""

from pathlib import Path

from loralens.analysis.clients.rules import check
from loralens.choices import Consumer
from loralens.core.adapter import Adapter, Finding
from loralens.core.naming.matching import match
from loralens.errors import MismatchError
from loralens.formats.models.checkpoint import shapes
from loralens.verbs.inputs.bases import ModelPath, with_tied_head


def consumer_findings(adapter: Adapter, consumer: Consumer, base: ModelPath | None) -> list[Finding]:
    """The findings about ``consumer``, the program that loads the adapter.

    With a base, the names of the modules are compared with it too, because some programs look names up as they are.
    """
    matched = None
    if base is not None:
        # Names that match nothing are a finding of the doctor itself.
        try:
            matched = match(
                {name: module.shape for name, module in adapter.items()}, with_tied_head(shapes(Path(base)), base)
            )
        except MismatchError:
            matched = None
    return check(adapter, consumer, matched)
