"""The list of mistakes fits the code: each is found, once, is Python, and names tests that are there."""

import pytest

from tests.mutants.mutant import ROOT, Mutant, mutated
from tests.mutants.table import MUTANTS


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.label)
def test_a_mistake_is_found_and_is_python(mutant: Mutant) -> None:
    path, changed = mutated(mutant)
    assert changed != path.read_bytes()
    compile(changed, str(path), "exec")
    assert (ROOT / mutant.test).is_file()


def test_no_mistake_is_listed_twice() -> None:
    assert len({(one.function, one.before, one.after) for one in MUTANTS}) == len(MUTANTS)


@pytest.mark.slow
def test_what_stands_nowhere_or_twice_is_refused() -> None:
    with pytest.raises(LookupError, match="stands not in phi_map"):
        mutated(Mutant("phi_map", "no such source", "x", ""))
    with pytest.raises(LookupError, match="2 times in phi_map"):
        mutated(Mutant("phi_map", "cumsum(", "sum(", ""))
