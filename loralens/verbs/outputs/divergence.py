"""The error message for a loss that is not finite: which texts it was of, and which files of the run are left."""

from collections.abc import Sequence

from loralens.errors import DivergenceError
from loralens.formats.records.training import Training

NAMED = 8  # texts that a message names


def explain_divergence(
    error: DivergenceError, *, texts: Sequence[int], name: str, training: Training | None, done: int
) -> DivergenceError:
    """The error of the step after ``done``, with its texts of the file ``name`` and the last good snapshot.

    ``training`` is None where the run has not begun to write. The snapshot of the step before is what the loss was not
    finite with: the last good one is older.
    """
    numbers = ", ".join(str(text + 1) for text in texts[:NAMED]) + (f" … ({len(texts)})" if len(texts) > NAMED else "")
    what = f"{error.what}, texts {numbers} of {name}"
    if training is None:
        return DivergenceError(what, fix=error.fix)
    good = [path for step, path in training.snapshots if step < done]
    if good:
        what += f"; the last good snapshot is {good[-1]}"
    else:
        what += f"; {training.folder} keeps the log, and there was no good snapshot yet"
    return DivergenceError(what, fix=f"{error.fix}; then begin anew: --overwrite")
