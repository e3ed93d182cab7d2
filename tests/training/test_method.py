"""Methods as combinations of axes."""

from typing import Any

import pytest

from loralens import OptionError
from loralens.training import METHODS
from loralens.training.course import training_method


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_name_is_short_for_its_axes(method: Any) -> None:
    given = {
        "scale_rule": method.scale_rule,
        "start": method.start,
        "magnitude": method.magnitude,
        "freeze_a": method.frozen,
        "lr_ratio": method.ratio,
    }
    assert training_method("lora", **given) is method
    assert training_method(method.name) is method
    assert training_method(method.name, **given) is method


def test_an_option_replaces_what_the_method_has() -> None:
    assert training_method("dora", magnitude=False).name == "lora"
    assert training_method("dora", scale_rule="rslora").name == "rslora, dora"
    assert training_method("lora+", lr_ratio=2).name == "lora+2"
    assert training_method("pissa", start="kaiming") is training_method("lora")
    assert training_method("lora", start="gaussian").name == "lora"


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"start": "zeros"}, r"start 'zeros' does not exist\n  fix: choose one of kaiming"),
        ({"magnitude": "yes"}, r"magnitude .yes. does not exist\n  fix: choose one of True, False"),
        ({"lr_ratio": 0}, "lr_ratio 0 is not a positive number"),
        ({"lr_ratio": 1e9}, "lr_ratio 1000000000.0 is not a positive number up to 1e"),
    ],
)
def test_values_that_no_axis_has_are_refused(axes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        training_method(**axes)
