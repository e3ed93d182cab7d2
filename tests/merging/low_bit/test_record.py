"""The bytes of a merge into codes, what arrived of the update, and the exact way back."""

from dataclasses import replace
from hashlib import sha256

import numpy as np
import pytest

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, MismatchError
from loralens.merging.low_bit import apply, record
from loralens.merging.low_bit.apply import added_numbers
from loralens.merging.low_bit.measure import DrawPrediction
from loralens.merging.low_bit.restore import restore_codes
from loralens.merging.low_bit.verify import code_verdicts
from loralens.merging.summary import hashed_tensors, merged_modules, module_entries, total_entry
from loralens.merging.undo.layout import layout_version, pack_arrays, pack_entry, parse_undo
from tests.merging.low_bit.grids import part, weight
from tests.merging.low_bit.made import Made, merged

LAYOUTS = ("Q4_0", "Q4_1", "NF4")
FORMS = (lambda made: made, lambda made: made.reordered(np.roll(np.arange(24), 5)), Made.in_one)


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
    return np.vstack([block.drawn.codes for block in made.merge(**options).blocks()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_are_those_of_the_moved_codes_and_the_base_comes_back(layout, form, monkeypatch):
    monkeypatch.setattr(apply, "BLOCK", 5 * 64)
    made = form(Made(layout, size=5e-3, parts=2))
    data, rec = merged(made)
    codes = codes_of(made)
    assert (codes != made.grid.codes).mean() > 0.2
    np.testing.assert_array_equal(data, made.bytes_of(codes).reshape(-1))
    undo = undo_of(rec)
    assert rec.merged_hash == sha256(data.tobytes()).hexdigest()
    restored = restore_codes(undo, with_codes(made, codes), LazyArray.of(data.reshape(made.stored().shape)))
    assert b"".join(rows.tobytes() for rows in restored) == made.stored().read().tobytes()


def test_a_model_that_was_changed_or_has_other_codes_is_not_restored():
    made = Made()
    data, rec = merged(made)
    undo, codes = undo_of(rec), codes_of(made)
    stored = LazyArray.of(data.reshape(made.stored().shape))
    with pytest.raises(MismatchError, match="is not as it was merged"):
        list(restore_codes(undo, with_codes(made, codes), made.stored()))
    for other in (None, replace(made.weight, grid=None), replace(made.weight, shape=(12, 128))):
        with pytest.raises(MismatchError, match="not stored as codes"):
            list(restore_codes(undo, other, stored))
    with pytest.raises((MismatchError, FormatError), match=r"is not the base|codes that the grid does not have"):
        list(restore_codes(undo, with_codes(made, made.grid.codes), stored))


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


def test_a_layout_that_is_not_written_back_to_its_bytes_gets_no_undo():
    made = Made()
    inner = made.weight.encode
    made.weight = replace(made.weight, encode=lambda start, codes: inner(start, codes) ^ 1)
    made.bytes_of = lambda codes: inner(0, codes)
    with pytest.raises(FormatError, match="again gives other bytes"):
        merged(made)


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


@pytest.mark.parametrize("size", [1e-3, 3e-2])
def test_shares_of_codes_are_predicted_as_the_shares_that_are_measured(size):
    """Of small moves, and of moves by several steps, of which some are clipped only in part."""
    made = Made("Q4_1", 64, 512, size=size, seed=3)
    found = [merged(made, seed=seed)[1].fidelity[0].codes for seed in range(8)]
    assert np.mean([codes.clipped for codes in found]) == pytest.approx(found[0].predicted_clipped, rel=0.08)
    assert np.mean([codes.changed for codes in found]) == pytest.approx(found[0].predicted_changed, rel=0.03)
    total = total_entry([merged(made)[1]])
    assert total["predicted_clipped"] == found[0].predicted_clipped


@pytest.mark.parametrize("layout", ["Q4_1", "NF4"])
def test_the_error_in_some_directions_is_predicted_from_the_variances(layout):
    made = Made(layout, 48, 256, size=1e-3, seed=3)
    V = np.linalg.svd(made.D)[2][:3].T
    prediction = DrawPrediction()
    prediction.take(made.grid, made.D.astype(np.float32), directions=V)
    draws = [added_numbers(made.grid, codes_of(made, seed=seed)) - made.D for seed in range(60)]
    assert prediction.own == pytest.approx(np.mean([np.sum((lost @ V) ** 2) for lost in draws]), rel=0.05)
    # In all directions together it is the whole error.
    everywhere = DrawPrediction()
    everywhere.take(made.grid, made.D.astype(np.float32), directions=np.eye(256))
    assert everywhere.own == pytest.approx(everywhere.variance + everywhere.lost_energy, rel=1e-6)


def test_the_summaries_name_the_stored_tensor():
    made = Made()
    _, rec = merged(made)
    base = hashed_tensors([rec], {}, side="base")
    assert list(base) == ["w"]
    assert base["w"].shape == made.stored().shape
    entry = module_entries(merged_modules([rec]))[0]
    assert {"changed", "clipped", "noise", "rounding", "predicted_clipped"} <= set(entry)
    total = total_entry([rec])
    assert total["drawn"] == 1
    assert total["undo_bits_per_weight"] == pytest.approx(8 * rec.patch_bytes / (24 * 64))


def test_verdicts_tell_seeds_strengths_and_other_models_apart():
    made = Made("Q4_1", 64, 512, size=2e-3, seed=5)
    codes = codes_of(made)

    def outcome(moved, **options):
        (verdict,) = code_verdicts(made.merge(**options), moved)
        return verdict.outcome

    assert outcome(with_codes(made, codes)) == "exact"
    assert outcome(with_codes(made, codes), seed=1) == "rounded"
    assert outcome(with_codes(made, made.grid.codes)) == "absent"
    half = Made("Q4_1", 64, 512, size=1e-3, seed=5)
    assert outcome(with_codes(made, codes_of(half))) == "partial"
    assert outcome(None) == "absent"


def test_what_codes_cannot_hold_is_refused():
    made = Made()
    for missing in ({"grid": None}, {"encode": None}, {"shape": (2, 12, 64)}):
        with pytest.raises(FormatError, match="cannot be merged into yet"):
            apply.check_movable(made.plan, replace(made.weight, **missing))
    with pytest.raises(MismatchError, match="replaces numbers"):
        apply.check_movable(replace(made.plan, replacement=LazyArray.of(made.D)), made.weight)
    assert record.codes_as_bytes(np.array([[-8, 7]], np.int16), -8).tolist() == [[0, 15]]
    assert weight(made.grid).encode is not None
