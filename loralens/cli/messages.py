"""Messages of the verbs on standard error, as ``warning: …`` and ``note: …`` lines."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from loralens.cli.progress import progress_bar
from loralens.cli.terminal import say
from loralens.core.messages import LEVELS, LOGGER
from loralens.core.progress import display_progress

NAMES = {number: name for name, number in LEVELS.items()}


class StandardError(logging.Handler):
    """Prints every message with its level before it, to what is standard error at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        level = NAMES.get(record.levelno, record.levelname.lower())
        say(*f"{level}: {record.getMessage()}".split("\n"), err=True)  # names in it hold no line ends


@contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Within the block, messages of all levels and the progress of the verbs go to standard error."""
    handler, level, propagate = StandardError(), LOGGER.level, LOGGER.propagate
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # they have been shown
    try:
        with display_progress(progress_bar):
            yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
        LOGGER.propagate = propagate
