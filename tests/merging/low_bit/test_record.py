"""The bytes of a merge into codes, what arrived of the update, and the exact way back."""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from loralens import FormatError, MismatchError
from loralens.core import LazyArray
from loralens.merging import merge_plan as matrix
from loralens.merging.grid_moves import added_numbers
from loralens.merging.merge_plan import Magnitude
from loralens.merging.undo import layout_version, pack_arrays, pack_entry, parse_undo, restore_tensor
from loralens.merging.verify import verdicts
from tests.merging.low_bit.grids import part
from tests.merging.low_bit.made import Made, merged
from tests.reference import dora_weight

LAYOUTS = ("Q4_0", "Q4_1", "NF4")
# The rows of an expert begin within the stored tensor of its stack.
FORMS = (lambda made: made, lambda made: made.reordered(np.roll(np.arange(24), 5) + 7), Made.in_one)


def packed(rec):
    """The arrays and the entry of the undo file of the weight ``w``."""
    return {f"w{end}": array for end, array in pack_arrays(rec).items()}, pack_entry(rec)


def undo_of(rec):
    arrays, entry = packed(rec)
    empty = {"copies": {}, "headers": {}, "texts": {}, "dropped": []}
    content = {"version": layout_version([rec]), "tensors": {"w": entry}, **empty}
    return parse_undo(arrays, content).tensor("w")


def with_codes(made, codes):
    """The coded weight of a merged model."""
    inner = made.weight
    moved = replace(made.grid, codes=codes)
    return replace(inner, grid=lambda start, stop: part(moved, start, stop))


def codes_of(made, **options):
    return np.vstack([block.codes for block in made.merge(**options).blocks()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_are_those_of_the_moved_codes_and_the_base_comes_back(layout, form, monkeypatch):
    made = form(Made(layout, size=5e-3, parts=2))
    codes = codes_of(made)  # in one block; the division into blocks changes no code
    monkeypatch.setattr(matrix, "row_ranges", lambda rows, columns: [(i, min(i + 5, rows)) for i in range(0, rows, 5)])
    data, rec = merged(made)
    assert (codes != made.grid.codes).mean() > 0.2
    np.testing.assert_array_equal(data, made.bytes_of(codes).reshape(-1))
    undo = undo_of(rec)
    assert rec.merged_hash == sha256(data.tobytes()).hexdigest()
    restored = restore_tensor(undo, LazyArray.of(data.reshape(made.stored().shape)), weight=with_codes(made, codes))
    assert made.file_bytes(restored).tobytes() == made.stored().read().tobytes()


def test_a_model_that_was_changed_or_has_other_codes_is_not_restored():
    made = Made()
    data, rec = merged(made)
    undo, codes = undo_of(rec), codes_of(made)
    stored = LazyArray.of(data.reshape(made.stored().shape))
    with pytest.raises(MismatchError, match="is not as it was merged"):
        list(restore_tensor(undo, made.stored(), weight=with_codes(made, codes)))
    for other in (None, replace(made.weight, grid=None), replace(made.weight, shape=(12, 128))):
        with pytest.raises(MismatchError, match="not stored as codes"):
            list(restore_tensor(undo, stored, weight=other))
    with pytest.raises((MismatchError, FormatError), match=r"is not the base|codes that the grid does not have"):
        list(restore_tensor(undo, stored, weight=with_codes(made, made.grid.codes)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("weight", 3), ("weight", None), ("weight", ""), ("matrix", [24]), ("matrix", [1 << 40, 1 << 40]),
     ("matrix", [24, -64]), ("slabs", [{}]), ("different", 1 << 40), ("shape", "x")],
)  # fmt: skip
def test_a_hostile_entry_is_refused(field, value):
    _, rec = merged(Made())
    arrays, entry = packed(rec)
    empty = {"copies": {}, "headers": {}, "texts": {}, "dropped": []}
    content = {"version": 2, "tensors": {"w": {**entry, field: value}}, **empty}
    with pytest.raises(FormatError, match="malformed"):
        parse_undo(arrays, content).tensor("w")


def test_what_arrived_is_what_is_measured_densely():
    made = Made("Q4_1", 48, 256, size=1e-3, seed=3)
    _, rec = merged(made)
    (fidelity,) = rec.fidelity
    codes, D = codes_of(made), made.D
    moved = added_numbers(made.grid, codes).astype(np.float64)
    V = np.linalg.svd(D)[2][:3].T
    assert fidelity.gain == pytest.approx(np.sum(moved * D) / np.sum(D**2), rel=1e-5)
    assert fidelity.error == pytest.approx(np.linalg.norm(moved - D) / np.linalg.norm(D), rel=1e-5)
    assert fidelity.subspace_error == pytest.approx(np.linalg.norm((moved - D) @ V) / np.linalg.norm(D), rel=1e-4)
    of_codes = fidelity.codes
    assert of_codes is not None
    assert of_codes.changed == pytest.approx((codes != made.grid.codes).mean())
    assert of_codes.changed == pytest.approx(1 - fidelity.unmoved)


def test_the_noise_is_the_formula_and_the_prediction_holds_over_seeds():
    made = Made("Q4_1", 64, 512, size=1e-3, seed=3)
    results = [merged(made, seed=seed)[1].fidelity[0] for seed in range(8)]
    D, steps = made.D, np.abs(made.grid.step[:, made.grid.group_of_column]).astype(np.float64)
    asked = np.divide(D, made.grid.step[:, made.grid.group_of_column], out=np.zeros_like(D), where=steps > 0)
    inside = (made.grid.codes + asked >= 0) & (made.grid.codes + asked <= 15) & (steps > 0)
    size = np.abs(D)
    noise = np.sqrt(np.sum((steps * size - D**2)[inside & (np.abs(asked) < 1)])) / np.linalg.norm(D)
    assert results[0].codes.noise == pytest.approx(noise, rel=2e-2)
    gains = [one.gain for one in results]
    assert np.mean(gains) == pytest.approx(results[0].predicted_gain, abs=0.02)
    assert np.mean([one.error for one in results]) == pytest.approx(results[0].predicted_error, rel=0.02)
    assert np.mean([one.codes.changed for one in results]) == pytest.approx(
        results[0].codes.predicted_changed, rel=0.02
    )


def test_verdicts_tell_seeds_strengths_and_other_models_apart():
    made = Made("Q4_1", 64, 512, size=2e-3, seed=5)
    codes = codes_of(made)

    def outcome(moved, **options):
        (verdict,) = verdicts(made.merge(**options), moved)
        return verdict.outcome

    assert outcome(with_codes(made, codes)) == "exact"
    assert outcome(with_codes(made, codes), seed=1) == "rounded"
    assert outcome(with_codes(made, made.grid.codes)) == "absent"
    half = Made("Q4_1", 64, 512, size=1e-3, seed=5)
    assert outcome(with_codes(made, codes_of(half))) == "partial"
    assert outcome(None) == "absent"


def test_dora_moves_codes_by_what_it_changes_of_the_numbers():
    made = Made("Q4_1", 24, 64, size=1e-2)
    lengths = np.linspace(1, 2, 24, dtype=np.float32)
    segment = replace(made.segments[0], magnitude=Magnitude(LazyArray.of(lengths), "rows"))
    made.plan = replace(made.plan, segments=(segment,))
    (block,) = made.merge().blocks()
    W = made.grid.values(made.grid.codes).astype(np.float64)
    np.testing.assert_allclose(block.D, dora_weight(W + made.D, lengths, 0) - W, rtol=1e-4, atol=1e-6)
