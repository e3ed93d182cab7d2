"""What a budget protects."""

import numpy as np
import pytest

from loralens import OptionError
from loralens.compression.directions import protection

SPECTRA = {"m.0.q_proj": np.array([3.0, 4.0])[::-1], "m.0.v_proj": np.array([2.0]), "m.1.q_proj": np.zeros(0)}


def test_no_norm_is_too_large_or_too_small():
    far = {"q": np.array([1e200]), "k": np.array([1e180]), "v": np.array([1e-200])}
    assert list(protection(far, "relative").values()) == pytest.approx([1, 1e40, 1e100])


def test_the_first_glob_that_matches_counts_and_the_rest_is_one():
    found = protection(SPECTRA, {"m.0.*": 5, "q_proj": 2})
    assert found == {"m.0.q_proj": 5.0, "m.0.v_proj": 5.0, "m.1.q_proj": 2.0}
    assert protection(SPECTRA, {"q_proj": 0}) == {"m.0.q_proj": 0.0, "m.0.v_proj": 1.0, "m.1.q_proj": 0.0}


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), True, "2", None])
def test_weights_are_numbers(weight):
    with pytest.raises(OptionError, match="the weight of q_proj is"):
        protection(SPECTRA, {"q_proj": weight})


def test_a_glob_that_matches_nothing_is_refused():
    with pytest.raises(OptionError, match="no module matches"):
        protection(SPECTRA, {"k_proj": 2})
