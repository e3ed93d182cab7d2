"""The base comes back bit for bit, whatever it holds and however it was merged; a near miss is an error."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, MismatchError
from loralens.core import LazyArray
from loralens.merging.codec import prepare_merge
from loralens.merging.merge_record import MergeRecorder
from loralens.merging.merge_rounding import MergeRounding
from loralens.merging.patch import bits
from loralens.merging.planning import plan_merge
from loralens.merging.undo import VERSION, pack_arrays, pack_entry, parse_undo, restore_tensor
from tests.marks import examples
from tests.merging.made import CASES, DTYPES, Maker, linear, streamed, tokens

TARGETS = (None, np.float32, np.float16, ml_dtypes.bfloat16)
MODES = ("nearest", "stochastic", "feedback")


def awkward(rng, array):
    """Zeros of both signs, denormals, infinities, NaN with a payload, the largest and smallest numbers among others."""
    info = ml_dtypes.finfo(array.dtype)
    odd = [0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, info.max, info.min, info.tiny]
    if array.dtype.itemsize > 1:
        odd += [np.inf, -np.inf, np.nan]
    flat = array.ravel().copy()
    for value in odd:
        flat[rng.integers(flat.size)] = value
    if array.dtype.itemsize > 1:
        bits(flat)[:1] |= (1 << (8 * array.dtype.itemsize - 1)) - 1  # a NaN with every payload bit
    return flat.reshape(array.shape)


def merged_and_undo(case, dtype, mode):
    """The merged tensors by key, and the undo file's content."""
    tensors, arrays, entries = {}, {}, {}
    for key, tensor in plan_merge(case.adapters, case.lazy, **case.options).tensors.items():
        merge = prepare_merge(tensor, dtype=dtype, rounding=MergeRounding(mode, 3, key))
        watch = MergeRecorder(merge)
        tensors[key] = np.concatenate([rows.copy() for rows in watch.blocks()]).reshape(tensor.shape)
        record = watch.record()
        if tensor.base is not None:
            entries[key] = pack_entry(record)
            arrays |= {f"{key}{end}": array for end, array in pack_arrays(record).items()}
    content = {"version": VERSION, "tensors": entries, "dropped": [], "copies": {}, "headers": {}, "texts": {}}
    return tensors, parse_undo(arrays, content)


def check(case, tensors, undo):
    for key, before in case.base.items():
        if key in undo.entries:
            rows = list(restore_tensor(undo.tensor(key), streamed(tensors[key])))
            found = np.concatenate([row.ravel() for row in rows])
            assert found.dtype == before.dtype
            np.testing.assert_array_equal(bits(found), bits(before))
            assert undo.outline(key) == (before.dtype, before.shape)


@given(
    st.sampled_from(CASES),
    st.sampled_from(DTYPES),
    st.sampled_from(TARGETS),
    st.sampled_from(MODES),
    st.sampled_from([1e-6, 2e-3, 0.03, 1.0, 1e5]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
@examples(250)
def test_the_base_comes_back_bit_for_bit(made, dtype, target, mode, size, odd, seed):
    make = Maker(seed, dtype, size)
    case = made(make)
    if odd:
        case.base = {key: awkward(make.rng, array) for key, array in case.base.items()}
    check(case, *merged_and_undo(case, target, mode))


@pytest.mark.parametrize("made", [linear, tokens], ids=["linear", "tokens"])
def test_a_changed_tensor_is_an_error_before_a_row_is_given(made):
    case = made(Maker(2, np.float16))
    tensors, undo = merged_and_undo(case, None, "nearest")
    ((key, array),) = tensors.items()
    bits(array)[5] ^= 1
    with pytest.raises(MismatchError, match="is not as it was merged"):
        next(iter(restore_tensor(undo.tensor(key), streamed(array))))
    with pytest.raises(MismatchError, match="is not as it was merged"):
        next(iter(restore_tensor(undo.tensor(key), streamed(array[:-1]))))


def test_a_wrong_factor_is_an_error():
    case = linear(Maker(3, np.float16))
    tensors, undo = merged_and_undo(case, None, "nearest")
    arrays = dict(undo.arrays)
    name = "a.weight#B.0.0"
    arrays[name] = LazyArray.of(2 * arrays[name].read())
    other = parse_undo(arrays, content_of(undo))
    with pytest.raises(MismatchError, match="the restored tensor is not the base"):
        list(restore_tensor(other.tensor("a.weight"), streamed(tensors["a.weight"])))


def content_of(undo):
    return {
        "version": VERSION, "tensors": undo.entries, "dropped": [], "copies": {}, "headers": {}, "texts": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"version": 3}, "of version 3, and this loralens reads up to 2"),  # written by earlier versions
        ({"headers": None}, "outline"),
        ({"dropped": ["x"]}, "outline"),
    ],
)
def test_a_damaged_outline_is_an_error(change, message):
    _, undo = merged_and_undo(linear(Maker(4, np.float16)), None, "nearest")
    with pytest.raises(FormatError, match=message):
        parse_undo(undo.arrays, content_of(undo) | change)
