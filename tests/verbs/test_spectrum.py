"""``loralens.spectrum``: paths and objects, the result equals the JSON of the command, wrong values are refused."""

from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from tests.cli.command import Command
from tests.verbs.shown import record_of


def test_paths_and_objects_give_what_the_command_prints(small: Path) -> None:
    printed = Command("spectrum").told(small)
    by_path = loralens.spectrum(small)
    assert record_of(by_path) == printed
    by_object = loralens.spectrum(loralens.load(small)).record()
    assert by_object["adapters"][0]["modules"] == printed["adapters"][0]["modules"]
    assert by_path[by_path.only.listed[0]].s.tolist() == printed["adapters"][0]["modules"][0]["singular_values"]
    assert "\n" not in repr(by_path)


def test_a_list_is_as_its_parts(small: Path) -> None:
    assert loralens.spectrum([small, small]).record() == loralens.spectrum(small, small).record()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, "no adapter is given"),
        ((3,), {}, "3 is not an adapter"),
        (("SMALL",), {"sort": "size"}, "choose one of name, rank"),
        (("SMALL",), {"top": 0}, "top 0"),
        (("SMALL",), {"device": "cuda"}, "give base"),
        (("LOADED",), {"alpha": 3.0}, "was already read"),
    ],
)
def test_wrong_values_are_refused(arguments: tuple, options: dict, message: str, small: Path) -> None:
    values = {"SMALL": small, "LOADED": loralens.load(small)}
    with pytest.raises(OptionError, match=message):
        loralens.spectrum(*(values.get(each, each) for each in arguments), **options)
