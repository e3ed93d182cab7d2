"""SIGTERM during a training run, which is answered when a step is done and the state of the run is saved."""

import signal
import threading
from types import FrameType
from typing import Self, final


@final
class Termination:
    """Within the context, SIGTERM only asks the run to stop; `answer` then does what the signal would have done.

    A second signal is answered at once. In threads other than the main one, and where SIGTERM is ignored, nothing is
    changed.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: signal.Handlers | int | object = None

    def __enter__(self) -> Self:
        # Python allows handlers to be set in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGTERM)
            if before not in (signal.SIG_IGN, None):
                self._before = before
                signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def answer(self) -> None:
        """End as the handler before this one would have: by KeyboardInterrupt on the command line, else at once."""
        self._restore()
        signal.raise_signal(signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        if self.asked:
            self.answer()
        self.asked = True

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]
            self._before = None
