"""Errors: what, where and how to fix it."""

import copy
import pickle
from functools import partial

import pytest

from loralens import FormatError, LoraLensError, MismatchError, OptionError, ShapeError
from loralens.core.adapter import Finding
from loralens.errors import as_typed, place

KINDS = [LoraLensError, FormatError, ShapeError, MismatchError, OptionError]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_the_message(kind):
    error = kind("lora_A has no lora_B", fix="save it again")
    assert str(error) == "lora_A has no lora_B\n  fix: save it again"
    assert str(error.at("q_proj").at("a.safetensors")) == (
        "a.safetensors: q_proj: lora_A has no lora_B\n  fix: save it again"
    )
    assert (error.what, error.fix, error.where) == (
        "lora_A has no lora_B",
        "save it again",
        ("a.safetensors", "q_proj"),
    )


def test_places_are_added_on_the_way_out():
    with pytest.raises(ShapeError) as caught, place("outer"), place(3):
        raise ShapeError("what", fix="fix")
    assert caught.value.where == ("outer", "3")


def test_the_same_place_is_said_once():
    with pytest.raises(ShapeError) as caught, place("file"), place("file"):
        raise ShapeError("what", fix="fix").at("file")
    assert caught.value.where == ("file",)


def test_the_same_place_further_in_stays():
    assert OptionError("what", fix="fix").at("a").at("b").at("a").where == ("a", "b", "a")


def test_other_errors_pass_untouched():
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught, place("here"):
        raise error
    assert caught.value is error
    with place("here"):
        pass


@kinds
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_it_survives_the_way_from_another_process(kind, copied):
    error = kind("what", fix="fix").at("here")
    again = copied(error)
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.where == ("here",)


def test_options_are_spelled_for_the_place_where_they_are_shown():
    error = OptionError(
        "--bits and --dtype exclude each other",
        fix="write --grid rank=1,8, --dtype bf16 or -o OUT, add --overwrite, or leave it out: loralens drop A -o B",
    )
    with as_typed():
        assert str(error).startswith("--bits and --dtype exclude each other\n  fix: write --grid rank=1,8, --dtype")
    assert str(error) == (
        "bits= and dtype= exclude each other\n"
        "  fix: write grid='rank=1,8', dtype='bf16' or output=OUT, add overwrite=True, "
        "or leave it out: loralens drop A -o B"
    )


def test_a_finding_speaks_of_options_as_the_place_does_that_made_it():
    finding = partial(Finding, "warning", "alpha", "no --alpha is given", "give --rank 8")
    assert (finding().text, finding().fix) == ("no alpha= is given", "give rank=8")
    with as_typed():
        assert (finding().text, finding().fix) == ("no --alpha is given", "give --rank 8")
