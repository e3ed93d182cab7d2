"""Cases: the table of all that is recorded. A case is a name and calls; add yours to the file of its verb."""

from tests.golden import cases_change, cases_merge, cases_read, cases_screens, cases_train
from tests.golden.call import Case

CASES: tuple[Case, ...] = (
    *cases_read.CASES,
    *cases_change.CASES,
    *cases_merge.CASES,
    *cases_train.CASES,
    *cases_screens.CASES,
)


def _check(names: list[str]) -> None:
    assert len(set(names)) == len(names), sorted({name for name in names if names.count(name) > 1})


_check([case.name for case in CASES])
