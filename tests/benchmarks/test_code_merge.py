"""The times of a merge into the codes of one tensor."""

from benchmarks import code_merge


def test_every_type_has_its_two_times() -> None:
    figures = code_merge.measure(size=256, runs=1)
    assert figures.pop("goal_seconds") == 0.3
    assert figures.keys() == code_merge.SCALES.keys()
    for times in figures.values():
        # The record is made beside the merge itself.
        assert 0 <= times["bare"] < 5
        assert 0 <= times["record"] < 5
