"""`merge --bits keep` on a base in NF4: codes move, everything else stays, and the way back is exact."""

import json
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import OptionError
from tests.bases import MODULES, contents
from tests.cli.test_merge import CERTIFICATE
from tests.verbs.low_bit_bases import SHAPE, decode, floats, nf4_base, pair_adapter, stored, unpack


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return nf4_base(tmp_path / "base")


def changed_codes(base: Path, merged: Path, name: str) -> tuple[object, object]:
    before, after = stored(base), stored(merged)
    absmax = before[f"{name}.weight.absmax"]
    moved = decode(unpack(after[f"{name}.weight"]), absmax) - decode(unpack(before[f"{name}.weight"]), absmax)
    return moved, unpack(after[f"{name}.weight"]) != unpack(before[f"{name}.weight"])


def test_only_codes_change_and_the_update_arrives(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    result = loralens.merge(adapter, base=base, output=tmp_path / "out", bits="keep")
    before, after = stored(base), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    different = [key for key in before if not np.array_equal(before[key], after[key])]
    assert different == sorted(f"{name}.weight" for name in MODULES)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    dots = squares = 0.0
    for module in result.modules:
        moved, which = changed_codes(base, tmp_path / "out", module.fidelity.module)
        D = adapter[module.fidelity.module].dense()
        assert module.fidelity.gain == pytest.approx(np.sum(moved * D) / np.sum(D**2), rel=1e-4)
        assert module.fidelity.codes is not None
        assert module.fidelity.codes.changed == pytest.approx(np.mean(which))
        dots, squares = dots + np.sum(moved * D), squares + np.sum(D**2)
    assert 0.7 < dots / squares < 1.1
    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert certificate == result.record()
    assert (certificate["bits"], certificate["rounding"]) == ("keep", {"mode": "stochastic", "seed": 0})
    key = f"{MODULES[0]}.weight"
    digest = sha256(after[key].tobytes()).hexdigest()
    assert certificate["result"]["tensors"][key] == {"dtype": "uint8", "shape": [3072, 1], "sha256": digest}


def test_seeds_give_other_codes_and_the_same_seed_the_same_bytes(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        loralens.merge(adapter, base=base, output=tmp_path / name, bits="keep", seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]


def test_verify_reads_the_seed_from_the_certificate(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    loralens.merge(adapter, base=base, output=tmp_path / "out", bits="keep", seed=7)
    assert loralens.verify(tmp_path / "out", base=base, adapter=adapter).verdict == "exact"
    assert loralens.verify(tmp_path / "out", base=base, adapter=adapter, seed=8).verdict in ("rounded", "partial")
    assert loralens.verify(tmp_path / "out").answer
    # Without a certificate the seed is a guess, and the strength is still known.
    (tmp_path / "out" / CERTIFICATE).unlink()
    unknown = loralens.verify(tmp_path / "out", base=base, adapter=adapter)
    assert unknown.verdict in ("rounded", "partial")
    other = loralens.verify(tmp_path / "out", base=base, adapter=pair_adapter(seed=9))
    assert not other.answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "keep", "dtype": "bf16"}, "exclude each other"),
        ({"bits": "keep", "rounding": "feedback"}, "error feedback shrinks"),
        ({"bits": "nf4"}, "quantising their floats again loses the adapter"),
        ({"bits": "other"}, "is not possible"),
    ],
)
def test_options_that_do_not_go_together(base: Path, tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_decoded_merge_writes_floats_and_the_base_comes_back(base: Path, tmp_path: Path) -> None:
    adapter = pair_adapter()
    loralens.merge(adapter, base=base, output=tmp_path / "out", dtype="f32")
    after, before = stored(tmp_path / "out"), stored(base)
    assert set(after) == {"model.norm.weight", *(f"{name}.weight" for name in MODULES)}
    for name in MODULES:
        W = decode(unpack(before[f"{name}.weight"]), before[f"{name}.weight.absmax"])
        np.testing.assert_allclose(after[f"{name}.weight"], W + adapter[name].dense(), rtol=0, atol=1e-7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"
    assert loralens.verify(tmp_path / "out", base=base, adapter=adapter).verdict == "exact"
    loralens.unmerge(tmp_path / "out", output=tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)


def test_floats_have_no_codes_to_keep(tmp_path: Path) -> None:
    from tests.bases import single

    folder = single(tmp_path / "floats", floats())
    with pytest.raises(OptionError, match="no codes to keep"):
        loralens.merge(pair_adapter(), base=folder, output=tmp_path / "out", bits="keep")
    assert SHAPE == (48, 128)


def test_an_update_is_not_subtracted_from_codes(base: Path, tmp_path: Path) -> None:
    loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="keep")
    with pytest.raises(OptionError, match="an update cannot be subtracted from codes"):
        loralens.unmerge(tmp_path / "out", adapter=pair_adapter(), dry_run=True)
