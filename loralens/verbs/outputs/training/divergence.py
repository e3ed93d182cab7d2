"""The error for a loss that is not finite: the texts of the step, and the snapshot from which a run can go on."""

from collections.abc import Sequence

from loralens.errors import DivergenceError
from loralens.formats.records.training import Training

NAMED = 8  # texts that the message names; a step may have hundreds


def explain_divergence(
    error: DivergenceError, *, texts: Sequence[int], name: str, training: Training | None, done: int
) -> DivergenceError:
    """The error of the step after ``done``, with the numbers of its texts and the last good snapshot.

    Parameters
    ----------
    error : DivergenceError
        The error of the training loop.
    texts : sequence of int
        The indices of the texts of this step.
    name : str
        The file of the texts.
    training : Training or None
        The files of the run; None if it has not begun to write.
    done : int
        The number of completed steps.
    """
    # People count lines from 1.
    numbers = ", ".join(str(text + 1) for text in texts[:NAMED]) + (f" … ({len(texts)})" if len(texts) > NAMED else "")
    what = f"{error.what}, texts {numbers} of {name}"
    if training is None:
        return DivergenceError(what, fix=error.fix)
    # The weights after step ``done`` gave the loss that is not finite, so the last good snapshot is older.
    good = [path for step, path in training.snapshots if step < done]
    if good:
        what += f"; the last good snapshot is {good[-1]}"
    else:
        what += f"; {training.folder} keeps the log, and there was no good snapshot yet"
    return DivergenceError(what, fix=f"{error.fix}; then begin anew: --overwrite")
