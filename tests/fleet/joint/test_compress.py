"""A fleet in one file: what comes back, how far it is from what went in, and what is stored once."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.core.fingerprint import fingerprint
from loralens.errors import FormatError, OptionError
from loralens.fleet.joint import compress
from loralens.fleet.joint.code_group import FleetSource
from loralens.fleet.joint.compress import compress_fleet
from loralens.fleet.joint.expand import expand_adapter
from loralens.formats.files.container import read_safetensors
from loralens.formats.records.fleets.reader import FleetFile
from tests.conformance.test_conformance import CASES, adapter_path, options
from tests.fleet.joint.collection import HEAD, IN, NAMES, OUT, SPACE, adapter, factors, make

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    sources = make(root)
    result = compress_fleet([list(sources.values())], root / "fleet.safetensors", error=0.15)
    return sources, result, root


def dense_error(before, after):
    lost = sum(np.sum((before[name].dense() - after[name].dense()) ** 2) for name in before)
    total = sum(np.sum(before[name].dense() ** 2) for name in before)
    return float(np.sqrt(lost / total)) if total else float(lost > 0)


def test_every_adapter_comes_back_with_the_error_that_was_printed(fleet):
    sources, result, root = fleet
    assert [row.name for row in result.adapters] == sorted(sources)
    file = FleetFile(root / "fleet.safetensors")
    for row in result.adapters:
        back = expand_adapter(file, row.name, root / "back" / row.name)
        measured = dense_error(sources[row.name].load(), loralens.load(root / "back" / row.name))
        # The table, the file and what expand says are one number.
        assert measured == pytest.approx(row.error, abs=1e-6)
        assert back.error == pytest.approx(row.error, abs=1e-6)
        assert measured <= 0.15


def test_a_run_shares_bases_copies_share_numbers_and_strangers_are_alone(fleet):
    kinds = {row.name: row.kind for row in fleet[1].adapters}
    assert {name for name, kind in kinds.items() if kind == "joint"} == {f"run{i}" for i in range(6)}
    assert {name for name, kind in kinds.items() if kind == "copy"} == {"copy-gauge", "copy-scale", "copy-half"}
    assert {name for name, kind in kinds.items() if kind == "alone"} == {"stranger", "zero"}
    assert all(row.own_bytes == 0 for row in fleet[1].adapters if row.kind == "copy")


def test_ranks_scales_dtypes_and_configurations_are_those_of_the_source(fleet):
    sources, _, root = fleet
    file = FleetFile(root / "fleet.safetensors")
    for name, source in sources.items():
        before, after = source.load(), file.adapter(name)
        assert after.config == before.config
        for module in before:
            a, b = after[module], before[module]
            assert (a.shape, a.rank, a.scale, a.scaling, a.dtype) == (b.shape, b.rank, b.scale, b.scaling, b.dtype)
        expand_adapter(file, name, root / "same" / name)
        config = json.loads((root / "same" / name / "adapter_config.json").read_text())
        # Compressing cuts no rank, so the configuration is the same to the byte.
        assert config == json.loads((Path(source.path) / "adapter_config.json").read_text())


def test_a_rank_that_is_larger_than_the_weight_comes_back_too(tmp_path):
    """A classifier of two rows has rank 8 in the configuration, and so in the expanded adapter."""
    rng = np.random.default_rng(4)
    wide = [(rng.standard_normal((2, 8)).astype(np.float32), rng.standard_normal((8, 30)).astype(np.float32))]
    modules = {"classifier": adapter([*wide, *wide, *wide, *wide])[NAMES[0]]}
    before = replace(adapter([*wide, *wide, *wide, *wide]), modules=modules, config=None)
    loralens.save(before, tmp_path / "wide")
    sources = [FleetSource("wide", str(tmp_path / "wide"))]
    compress_fleet([sources], tmp_path / "fleet.safetensors", error=0.05)
    expand_adapter(tmp_path / "fleet.safetensors", "wide", tmp_path / "back")
    after = loralens.load(tmp_path / "back")["classifier"]
    assert (after.rank, after.scale, after.shape) == (8, 2.0, (2, 30))
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "wide" / "adapter_config.json").read_text())
    assert config["r"] == 8
    assert dense_error(loralens.load(tmp_path / "wide"), loralens.load(tmp_path / "back")) <= 0.05
    expand_adapter(tmp_path / "fleet.safetensors", "wide", tmp_path / "cut", rank=1)
    assert loralens.load(tmp_path / "cut")["classifier"].rank == 1


def test_targets_that_leave_out_a_module_come_back_as_they_were(tmp_path):
    pairs = factors(np.random.default_rng(5), [(np.eye(OUT)[:, :SPACE], np.eye(IN)[:, :SPACE])] * 4)
    loralens.save(adapter(pairs), tmp_path / "few")
    config = json.loads((tmp_path / "few" / "adapter_config.json").read_text())
    config["target_modules"] = r".*\.q_proj"
    (tmp_path / "few" / "adapter_config.json").write_text(json.dumps(config))
    compress_fleet([[FleetSource("few", str(tmp_path / "few"))]], tmp_path / "fleet.safetensors", error=0.15)
    expand_adapter(tmp_path / "fleet.safetensors", "few", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text()) == config
    # A smaller rank is another configuration, and it names every module of the file.
    expand_adapter(tmp_path / "fleet.safetensors", "few", tmp_path / "cut", rank=2)
    cut = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert cut["r"] == 2
    assert cut["target_modules"] == list(NAMES)


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("left", "right", "dtype"),
    [
        (1e25, 1e26, np.float32), (3e37, 3e37, np.float32), (6e3, 6e3, np.float16), (1e120, 1e120, np.float64),
        (1e-80, 1e-80, np.float64), (1e-120, 1e-120, np.float64),
    ],
)  # fmt: skip
def test_one_adapter_with_an_extreme_norm_does_not_stop_the_others(left, right, dtype, tmp_path):
    sources = make(tmp_path)
    pairs = factors(np.random.default_rng(8), [(np.eye(OUT)[:, :SPACE], np.eye(IN)[:, :SPACE])] * 4)
    huge = [(B.astype(dtype) * dtype(left), A.astype(dtype) * dtype(right)) for B, A in pairs]

    loralens.save(adapter(huge, dtype=dtype), tmp_path / "huge")
    sources["huge"] = FleetSource("huge", str(tmp_path / "huge"))
    result = compress_fleet([list(sources.values())], tmp_path / "fleet.safetensors", error=0.15)
    rows = {row.name: row for row in result}
    refused = {row.name: row.reason for row in result.refused}
    assert rows.keys() | refused.keys() == sources.keys()
    assert rows.keys() >= sources.keys() - {"huge"}
    assert {rows[f"run{i}"].kind for i in range(6)} == {"joint"}
    if "huge" in rows:
        back = expand_adapter(tmp_path / "fleet.safetensors", "huge").adapter
        before = loralens.load(tmp_path / "huge")
        worst = max(np.linalg.norm(before[n].dense() / left / right - back[n].dense() / left / right) for n in before)
        whole = np.sqrt(sum(np.linalg.norm(before[n].dense() / left / right) ** 2 for n in before))
        assert worst <= 0.15 * whole
    else:
        assert refused["huge"]


@pytest.mark.parametrize("count", [1, 4])
def test_adapters_of_a_run_with_huge_norms_do_not_stop_the_others(count, tmp_path):
    rng = np.random.default_rng(6)
    space = [(rng.standard_normal((OUT, SPACE)), rng.standard_normal((IN, SPACE))) for _ in NAMES]
    group = []
    for i in range(4 + count):
        pairs = factors(rng, space)
        if i >= 4:
            pairs = [(B * np.float32(1e25), A * np.float32(1e26)) for B, A in pairs]
        loralens.save(adapter(pairs), tmp_path / f"run{i}")
        group.append(FleetSource(f"run{i}", str(tmp_path / f"run{i}")))
    result = compress_fleet([group], tmp_path / "fleet.safetensors", error=0.15)
    assert {row.name: row.kind for row in result} == {
        f"run{i}": "joint" if i < 4 else "alone" for i in range(4 + count)
    }
    assert result.largest_error <= 0.15


def test_equal_heads_are_stored_once_and_come_back_bit_for_bit(fleet):
    sources, _, root = fleet
    stored = read_safetensors(root / "fleet.safetensors")
    heads = [key for key in stored.tensors if key.startswith("extras.")]
    # Those of run0 to run4 and the stranger are equal, that of run5 is not.
    assert len(heads) == 2
    file = FleetFile(root / "fleet.safetensors")
    for name, source in sources.items():
        before, after = source.load().extra, file.adapter(name).extra
        assert before.keys() == after.keys()
        for key, extra in before.items():
            assert (after[key].role, after[key].module) == (extra.role, extra.module)
            assert np.array_equal(after[key].tensor.read(), extra.tensor.read())
    assert HEAD in file.adapter("run5").extra


def test_bytes_of_pairs_and_files_are_counted_apart(fleet):
    sources, result, root = fleet
    pairs = sum(source.load().nbytes for source in sources.values())
    assert result.pair_bytes_before == pairs
    tensors = read_safetensors(root / "fleet.safetensors").tensors
    replaced = sum(t.nbytes for key, t in tensors.items() if key.endswith(".numbers") or key.startswith("groups."))
    assert result.pair_bytes_after == replaced == sum(part.after for part in result.parts())
    assert result.file_bytes_after == (root / "fleet.safetensors").stat().st_size
    files = sum((Path(s.path) / "adapter_model.safetensors").stat().st_size for s in sources.values())
    assert result.file_bytes_before == files


@pytest.mark.some(2)
@pytest.mark.parametrize("rank", [1, 2, 3, 9])
def test_a_smaller_rank_is_the_best_one_of_the_stored_update(fleet, rank):
    sources, _, root = fleet
    file = FleetFile(root / "fleet.safetensors")
    for name in ("run1", "stranger", "copy-scale"):
        whole, cut = file.adapter(name), expand_adapter(file, name, rank=rank)
        for module in whole:
            U, s, Vh = np.linalg.svd(whole[module].dense())
            best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
            assert cut.adapter[module].rank == min(rank, 4)
            assert np.allclose(cut.adapter[module].dense(), best, atol=1e-4 * s[0])
        measured = dense_error(sources[name].load(), cut.adapter)
        assert measured <= cut.error_bound + 1e-6
        # A bound that is far above would say nothing.
        assert cut.error_bound <= measured + 2 * cut.error + 1e-6


def test_a_smaller_error_takes_more_bytes(fleet, tmp_path):
    sources, result, _ = fleet
    finer = compress_fleet([list(sources.values())], tmp_path / "finer.safetensors", error=0.03)
    assert finer.largest_error <= 0.03
    assert finer.pair_bytes_after > 1.2 * result.pair_bytes_after


def test_the_rounding_to_a_narrow_dtype_counts_in_the_error(tmp_path):
    rng = np.random.default_rng(1)
    space = [(rng.standard_normal((OUT, SPACE)), rng.standard_normal((IN, SPACE))) for _ in NAMES]
    group = []
    for i in range(6):
        loralens.save(adapter(factors(rng, space, noise=0.0), dtype=ml_dtypes.bfloat16), tmp_path / f"run{i}")
        group.append(FleetSource(f"run{i}", str(tmp_path / f"run{i}")))
    # The rounding to bfloat16 adds 0.2 % of the norm to an error that is used up already.
    result = compress_fleet([group], tmp_path / "fleet.safetensors", error=0.03)
    assert {row.kind for row in result.adapters} == {"joint"}
    assert 0.029 < result.largest_error <= 0.03


@pytest.mark.slow
def test_the_same_fleet_gives_the_same_bytes(fleet, tmp_path):
    sources, _, root = fleet
    again = tmp_path / "again.safetensors"
    compress_fleet([list(sources.values())], again, error=0.15)
    assert again.read_bytes() == (root / "fleet.safetensors").read_bytes()


@pytest.mark.slow
def test_adapters_of_every_dialect_come_back(tmp_path):
    groups = [[FleetSource(case, str(adapter_path(case)), allow_pickle=True)] for case in CASES if not options(case)]
    result = compress_fleet(groups, tmp_path / "all.safetensors", error=0.1)
    assert not result.refused
    assert len(result.adapters) == len(groups) > 40
    file = FleetFile(tmp_path / "all.safetensors")
    for (source,), row in zip(groups, result.adapters, strict=True):
        before, after = source.load(), file.adapter(source.name)
        assert dense_error(before, after) == pytest.approx(row.error, abs=1e-6)
        assert after.extra.keys() == before.extra.keys()
        assert after.format == before.format
        if row.kind == "stored":
            assert fingerprint(after) == fingerprint(before)


def test_what_peft_cannot_hold_is_expanded_in_its_own_dialect(tmp_path):
    source = FleetSource("wan", str(adapter_path("comfyui-wan")))
    compress_fleet([[source]], tmp_path / "fleet.safetensors", error=0.1)
    with pytest.raises(FormatError, match="give --to comfyui"):
        expand_adapter(tmp_path / "fleet.safetensors", "wan", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    expand_adapter(tmp_path / "fleet.safetensors", "wan", tmp_path / "out.safetensors", to="comfyui")
    assert loralens.load(tmp_path / "out.safetensors").extra.keys() == source.load().extra.keys()


def test_an_adapter_with_nan_is_named_and_left_out(fleet, tmp_path):
    sources, _, _ = fleet
    loaded = sources["run0"].load()
    name = next(iter(loaded))
    broken = loaded[name]
    B = broken.B.copy()
    B[0, 0] = np.nan
    modules = {**loaded.modules, name: loralens.LowRank(B, broken.A, broken.scale, scaling=broken.scaling)}
    loralens.save(loralens.Adapter(modules=modules, config=loaded.config), tmp_path / "nan")
    group = [sources["run1"], sources["run2"], FleetSource("nan", str(tmp_path / "nan"))]
    result = compress_fleet([group], tmp_path / "fleet.safetensors", error=0.15)
    assert [row.name for row in result.adapters] == ["run1", "run2"]
    assert [row.name for row in result.refused] == ["nan"]
    assert "NaN" in result.refused[0].reason


@pytest.mark.parametrize("name", ["n\udce9", "two\nlines", "red\x1b[31m"])
def test_a_name_that_cannot_be_shown_does_not_stop_the_others(fleet, tmp_path, name):
    sources = fleet[0]
    group = [sources["run1"], sources["run2"], FleetSource(name, sources["run0"].path)]
    result = compress_fleet([group], tmp_path / "fleet.safetensors", error=0.15)
    assert [row.name for row in result.adapters] == ["run1", "run2"]
    assert [(row.name, "rename its folder" in row.reason) for row in result.refused] == [(name, True)]
    assert FleetFile(tmp_path / "fleet.safetensors").entry("run2")


def test_a_full_disk_is_about_the_file_that_is_written(fleet, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(FormatError, match=r"fleet\.safetensors: cannot be written: No space left on device"):
        compress_fleet([list(fleet[0].values())], tmp_path / "fleet.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_copy_that_is_none_gets_its_own_numbers(fleet, tmp_path):
    sources, _, _ = fleet
    false = FleetSource("stranger", sources["stranger"].path, copy_of="run0")
    result = compress_fleet([[sources["run0"], false]], tmp_path / "fleet.safetensors", error=0.15)
    assert {row.name: row.kind for row in result.adapters} == {"run0": "alone", "stranger": "alone"}
    assert result.largest_error <= 0.15


@pytest.mark.parametrize("error", [0.0, 1.0, -1.0, 2.0])
def test_errors_outside_of_0_and_1_are_refused(fleet, tmp_path, error):
    with pytest.raises(OptionError, match="not between 0 and 1"):
        compress_fleet([list(fleet[0].values())], tmp_path / "fleet.safetensors", error=error)
    assert not list(tmp_path.iterdir())


def test_targets_that_cannot_be_written_are_refused_before_any_work(fleet, tmp_path):
    groups = [list(fleet[0].values())]
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    (tmp_path / "folder.safetensors").mkdir()
    for name, what in (("fleet.bin", "safetensors"), ("there.safetensors", "exists"), ("folder.safetensors", "folder")):
        with pytest.raises(OptionError, match=what):
            compress_fleet(groups, tmp_path / name)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine"
    with pytest.raises(OptionError, match="no adapter"):
        compress_fleet([], tmp_path / "new.safetensors")


def test_a_file_that_appeared_meanwhile_is_not_replaced(fleet, tmp_path, monkeypatch):
    groups, target, measure = [list(fleet[0].values())], tmp_path / "fleet.safetensors", compress._measure

    def beside_another_run(*arguments):
        target.write_bytes(b"of another run")
        return measure(*arguments)

    monkeypatch.setattr(compress, "_measure", beside_another_run)
    with pytest.raises(OptionError, match=r"fleet\.safetensors: another run has written there meanwhile"):
        compress_fleet(groups, target)
    assert target.read_bytes() == b"of another run"
    assert list(tmp_path.iterdir()) == [target]
    compress_fleet(groups, target, overwrite=True)
    assert FleetFile(target).contents.adapters


def test_names_that_do_not_exist_and_ranks_of_0_are_refused(fleet):
    path = fleet[2] / "fleet.safetensors"
    with pytest.raises(OptionError, match="run1"):
        expand_adapter(path, "run11")
    with pytest.raises(OptionError, match="not positive"):
        expand_adapter(path, "run1", rank=0)


def test_expand_never_writes_over_the_fleet(fleet):
    path = fleet[2] / "fleet.safetensors"
    before = path.read_bytes()
    with pytest.raises((OptionError, FormatError)):
        expand_adapter(path, "run1", path, overwrite=True)
    with pytest.raises(OptionError):
        expand_adapter(path, "run1", path.parent, overwrite=True)
    assert path.read_bytes() == before
