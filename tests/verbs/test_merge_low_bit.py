"""`merge --bits keep` on a base in NF4: codes move, everything else stays, and the way back is exact."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from tests.bases import MODULES, contents, single
from tests.cli.test_merge import CERTIFICATE
from tests.verbs.low_bit_bases import floats, nf4_base, pair_adapter, stored


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return nf4_base(tmp_path / "base")


def test_the_certificate_has_the_rounding_and_the_bytes_of_the_codes(base: Path, tmp_path: Path) -> None:
    result = loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="keep")
    certificate = json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    assert certificate == result.record()
    assert (certificate["bits"], certificate["rounding"]) == ("keep", {"mode": "stochastic", "seed": 0})
    key = f"{MODULES[0]}.weight"
    digest = sha256(stored(tmp_path / "out")[key].tobytes()).hexdigest()
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


def test_floats_have_no_codes_to_keep(tmp_path: Path) -> None:
    folder = single(tmp_path / "floats", floats())
    with pytest.raises(OptionError, match="no codes to keep"):
        loralens.merge(pair_adapter(), base=folder, output=tmp_path / "out", bits="keep")


def test_an_update_is_not_subtracted_from_codes(base: Path, tmp_path: Path) -> None:
    loralens.merge(pair_adapter(), base=base, output=tmp_path / "out", bits="keep")
    with pytest.raises(OptionError, match="an update cannot be subtracted from codes"):
        loralens.unmerge(tmp_path / "out", adapter=pair_adapter(), dry_run=True)
