"""The codes from which a merge leads to its codes, against all codes tried one by one; and what restores the base."""

from dataclasses import replace

import numpy as np
import pytest

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, MismatchError
from loralens.linalg.draws import Draws
from loralens.merging.low_bit import apply, origins
from loralens.merging.low_bit.apply import AddedRows, CodeRounding, prepare_codes
from loralens.merging.low_bit.origins import find_origins
from loralens.merging.low_bit.record import CodesRecorder
from loralens.merging.low_bit.restore import restore_codes
from loralens.merging.low_bit.stochastic import asked_moves, draw_codes, nearest_codes, uniform_numbers
from loralens.merging.low_bit.sweep import sweep_moments
from loralens.merging.plan import Magnitude, Slab
from loralens.merging.undo.layout import layout_version, pack_arrays, pack_entry, parse_undo
from loralens.merging.undo.patch import PatchReader, PatchWriter
from tests.merging.low_bit.grids import grid
from tests.merging.low_bit.made import Made
from tests.merging.low_bit.test_record import FORMS, with_codes
from tests.merging.low_bit.test_sweep import inputs

LAYOUTS = ("Q4_0", "Q4_1", "NF4", "FP4")
# What a patch of another merge is: it fits by chance, is too short or too long, or chooses what does not exist.
DAMAGED = r"is not the base that was merged|too short|beyond its tensor|does not exist"
EMPTY = {"copies": {}, "headers": {}, "texts": {}, "dropped": []}


def move(rows, added, mode, seed=0):
    """The codes that a merge makes of those of a grid."""
    moves = asked_moves(rows, added.to(rows))
    if mode == "nearest":
        return nearest_codes(rows, moves).codes
    return draw_codes(rows, moves, Draws.named(seed, "w"), 0).codes


def uniform_of(rows, mode, seed=0):
    if mode == "nearest":
        return None
    return uniform_numbers(Draws.named(seed, "w"), 0, rows.codes.size).reshape(rows.codes.shape)


def added_to(rows, size, dora, seed=1):
    rng = np.random.default_rng(seed)
    step = np.abs(rows.step[:, rows.group_of_column])
    D = (size * step * rng.standard_normal(rows.codes.shape)).astype(np.float32)
    factors = None
    if dora:
        shape = (len(D), 1) if dora == "rows" else (D.shape[1],)
        factors = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
    return AddedRows(D, factors)


@pytest.mark.parametrize("dora", [None, "rows", "columns"])
@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("size", [0.01, 0.4, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_origins_are_those_that_trying_every_code_finds(layout, size, mode, dora, monkeypatch):
    monkeypatch.setattr(origins, "SEARCHED", 37)
    base = grid(layout, 6, 64, seed=2)
    added, uniform = added_to(base, size, dora), uniform_of(base, mode)
    merged = replace(base, codes=move(base, added, mode))
    result = find_origins(merged, added, uniform)
    tried = {
        code: move(replace(base, codes=np.full_like(base.codes, code)), added, mode) for code in range(*ends(base))
    }
    leads = np.stack([tried[code] == merged.codes for code in tried]).reshape(len(tried), -1)
    several = np.flatnonzero(leads.sum(axis=0) > 1)
    np.testing.assert_array_equal(result.places, several)
    assert result.none == 0
    for place, options, number in zip(result.places, result.options, result.counts, strict=True):
        right = {code for code, hit in zip(tried, leads[:, place], strict=True) if hit}
        assert set(options[:number].tolist()) == right
        distances = np.abs(options[:number] - merged.codes.reshape(-1)[place])
        assert (np.diff(distances) >= 0).all()
        assert result.nearest.reshape(-1)[place] == options[0]
    choices = result.choices(base.codes)
    np.testing.assert_array_equal(result.chosen(choices), base.codes)


def ends(rows):
    return rows.lowest, rows.highest + 1


def test_codes_that_no_code_leads_to_are_counted_and_stay():
    base = replace(grid("Q4_1", 4, 64, codes=8), step=np.full((4, 2), 0.01, np.float32))
    result = find_origins(replace(base, codes=np.zeros((4, 64), np.int16)), AddedRows(0.025 * ones(base), None), None)
    assert result.none == 4 * 64
    np.testing.assert_array_equal(result.nearest, 0)
    with pytest.raises(FormatError, match="do not follow from the adapter"):
        result.choices(base.codes)


def ones(rows):
    return np.ones(rows.codes.shape, np.float32)


def test_a_choice_beyond_the_origins_is_refused():
    base = replace(grid("Q4_1", 4, 64, codes=15), step=np.full((4, 2), 0.01, np.float32))
    result = find_origins(base, AddedRows(0.0101 * ones(base), None), np.full(base.codes.shape, 0.5))
    assert (result.counts == 2).all()
    with pytest.raises(FormatError, match="chooses a code that does not exist"):
        result.chosen(np.full(4 * 64, 2, np.uint8))


def merged_for_adapter(made, merge):
    """The merged codes, the merged bytes, and the undo of the weight ``w`` that needs the adapter."""
    recorder = CodesRecorder(merge, made.stored(), origins=True)
    data = np.concatenate([rows.reshape(-1) for rows in recorder.blocks()])
    record = recorder.record()
    arrays = {f"w{end}": array for end, array in pack_arrays(record).items()}
    content = {"version": layout_version([record]), "tensors": {"w": pack_entry(record)}, **EMPTY}
    codes = np.vstack([block.drawn.codes for block in merge.blocks()])
    return codes, data, parse_undo(arrays, content).tensor("w"), record


def restored(made, codes, data, undo, plan=None, seed=None):
    """The bytes of the base from the merged codes, the adapter and the undo."""
    weight, draws = with_codes(made, codes), undo.draws
    rounding = CodeRounding(draws.mode, draws.seed if seed is None else seed, "w")
    # The magnitudes of DoRA are not needed again, since the undo has the factors that follow from them.
    plan = replace(plan or made.plan, slabs=tuple(replace(slab, magnitude=None) for slab in (plan or made.plan).slabs))
    merge = prepare_codes(plan, weight, rounding, slab_factors=undo.slab_factors)
    stored = LazyArray.of(data.reshape(made.stored().shape))
    return b"".join(rows.tobytes() for rows in restore_codes(undo, weight, stored, merge=merge))


def with_magnitude(made, axis="rows"):
    """The weight with DoRA in its last slab."""
    rng = np.random.default_rng(3)
    *first, last = made.slabs
    size = last.stop - last.start if axis == "rows" else 64
    lengths = LazyArray.of((1 + 0.1 * rng.random(size)).astype(np.float32) * 0.5)
    made.slabs = (*first, replace(last, magnitude=Magnitude(lengths, axis)))
    made.plan = replace(made.plan, slabs=made.slabs)
    return made


@pytest.mark.parametrize("mode", ["stochastic", "nearest"])
@pytest.mark.parametrize("dora", [None, "rows", "columns"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_base_comes_back_from_the_adapter_and_the_choices(layout, dora, mode, monkeypatch):
    monkeypatch.setattr(apply, "BLOCK", 5 * 64)
    made = Made(layout, size=5e-3, parts=2)
    made = with_magnitude(made, dora) if dora else made
    codes, data, undo, record = merged_for_adapter(made, made.merge(mode))
    assert (codes != made.grid.codes).mean() > 0.1
    # Blocks of other sizes have the same entries in the same order.
    monkeypatch.setattr(apply, "BLOCK", 11 * 64)
    assert restored(made, codes, data, undo) == made.stored().read().tobytes()
    assert (record.against, undo.draws.mode, sorted(undo.slab_factors)) == ("origins", mode, [12] if dora else [])
    assert all(slab.terms == () for slab in undo.slabs)


@pytest.mark.parametrize("form", FORMS)
def test_every_order_of_rows_in_a_file_comes_back(form):
    made = form(Made(size=5e-3))
    codes, data, undo, _ = merged_for_adapter(made, made.merge())
    assert restored(made, codes, data, undo) == made.stored().read().tobytes()


def test_the_corrections_are_few_beside_the_codes():
    made = Made("Q4_1", 256, 512, size=1e-4)
    codes, _, undo, _ = merged_for_adapter(made, made.merge())
    whole = CodesRecorder(made.merge(), made.stored())
    for _ in whole.blocks():
        pass
    changed = int((codes != made.grid.codes).sum())
    assert undo.patch.different < 0.1 * changed
    assert undo.patch.nbytes < 0.1 * whole.record().patch_bytes


@pytest.mark.parametrize("what", ["seed", "adapter", "correction", "other model"])
def test_what_does_not_belong_to_the_undo_is_refused(what):
    made = Made(size=5e-3)
    codes, data, undo, _ = merged_for_adapter(made, made.merge())
    assert undo.patch.different
    plan, seed, message = made.plan, 0, "is not the base that was merged"
    if what == "seed":
        seed, message = 1, DAMAGED
    elif what == "adapter":
        slab = made.slabs[0]
        terms = tuple((2 * strength, update) for strength, update in slab.terms)
        plan = replace(made.plan, slabs=(Slab("m0", 0, 24, terms),))
        message = DAMAGED
    elif what == "correction":
        choices = PatchReader(undo.patch, 1)._planes[0].some(1 << 20).copy()
        choices[np.flatnonzero(choices)[0]] = 0
        writer = PatchWriter(1, coding="xor")
        writer.block(choices, np.zeros_like(choices))
        undo = replace(undo, patch=writer.finish())
    else:
        data = data ^ 1
        message = "is not as it was merged"
    with pytest.raises((MismatchError, FormatError), match=message):
        restored(made, codes, data, undo, plan, seed)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounding", "sweep"), ("rounding", []), ("seed", 1.0), ("seed", True), ("seed", "1"), ("weight", 3),
     ("weight", ""),
     ("slabs", [{"module": "m", "start": 0, "stop": 24, "transposed": False, "factors": [[1, 1]], "gain": "rows"}]),
     ("slabs", [{"module": "m", "start": 0, "stop": 24, "transposed": False, "factors": [], "gain": None}]),
     ("slabs", [{"module": "m", "start": 0, "stop": 24, "transposed": False, "factors": [], "gain": "rows"}])],
)  # fmt: skip
def test_a_hostile_entry_is_refused(field, value):
    made = Made(size=5e-3)
    recorder = CodesRecorder(made.merge(), made.stored(), origins=True)
    for _ in recorder.blocks():
        pass
    record = recorder.record()
    arrays = {f"w{end}": array for end, array in pack_arrays(record).items()}
    content = {"version": 3, "tensors": {"w": {**pack_entry(record), field: value}}, **EMPTY}
    with pytest.raises(FormatError, match="malformed"):
        parse_undo(arrays, content).tensor("w")


@pytest.mark.parametrize("dtype", [np.float64, np.int64, np.uint8])
def test_factors_of_dora_in_another_dtype_are_refused(dtype):
    made = with_magnitude(Made(size=5e-3))
    recorder = CodesRecorder(made.merge(), made.stored(), origins=True)
    for _ in recorder.blocks():
        pass
    record = recorder.record()
    arrays = {f"w{end}": array for end, array in pack_arrays(record).items()}
    arrays["w#gain.0"] = LazyArray.of(arrays["w#gain.0"].read().astype(dtype))
    content = {"version": 3, "tensors": {"w": pack_entry(record)}, **EMPTY}
    with pytest.raises(FormatError, match="factors of DoRA of"):
        parse_undo(arrays, content).tensor("w")


def test_the_codes_of_a_sweep_are_kept_whole():
    made, H = Made(size=1e-2), sweep_moments(inputs(64))
    recorder = CodesRecorder(made.merge("sweep", moments=H), made.stored(), origins=True)
    for _ in recorder.blocks():
        pass
    record = recorder.record()
    assert (record.against, layout_version([record]), record.draws) == ("codes", 2, None)
