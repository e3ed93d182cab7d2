"""A loss that is no number: which texts it was of, and what is left of the run."""

from collections.abc import Sequence

from loralens.errors import DivergenceError
from loralens.formats.records.training import Training

NAMED = 8  # texts that a message names


def explained(
    error: DivergenceError, *, texts: Sequence[int], name: str, training: Training | None, done: int
) -> DivergenceError:
    """The error of the step after ``done``, with its texts of the file ``name`` and the last good snapshot.

    ``training`` is None where the run has not begun to write. The snapshot of the step before is what the loss was not
    finite with: the last good one is older.
    """
    said = f"{error.what}, texts {_some([text + 1 for text in texts])} of {name}"
    if training is None:
        return DivergenceError(said, fix=error.fix)
    good = [path for step, path in training.snapshots if step < done]
    if good:
        said += f"; the last good snapshot is {good[-1]}"
    else:
        said += f"; {training.folder} keeps the log, and there was no good snapshot yet"
    return DivergenceError(said, fix=f"{error.fix}; then begin anew: --overwrite")


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (f" … ({len(numbers)})" if len(numbers) > NAMED else "")
