"""``loralens inspect``: exact output on a small adapter, JSON, warnings."""

import json
from pathlib import Path

from tests.cli.command import Command

CALL = Command()
run, told, good, refused = CALL.run, CALL.told, CALL.good, CALL.refused


def test_json(small: Path) -> None:
    record = told("inspect", small)["adapters"][0]
    assert record["total"] == {"modules": 6, "parameters": 120, "bytes": 480, "extra_bytes": 0}
    assert [module["zero"] for module in record["modules"]] == [False] * 5 + [True]
    assert record["modules"][0]["scale_source"] == "α/r = 8/2 (adapter_config.json)"
    assert [finding["code"] for finding in record["findings"]] == ["zero-update"]


def test_a_file_without_its_configuration_says_that_alpha_is_unknown(small: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes((small / "adapter_model.safetensors").read_bytes())
    result = good("inspect", bare)
    assert "unknown, taken as 1" in result.stdout
    assert "α is unknown" in result.stdout
    assert "--alpha" in result.stdout
    given = told("inspect", "--alpha", "6", bare)["adapters"][0]
    assert given["modules"][0]["scale"] == 3.0
    assert [finding["code"] for finding in given["findings"]] == ["zero-update"]


def test_rank_that_disagrees_is_shown_by_inspect_and_refused_by_spectrum(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((small / "adapter_model.safetensors").read_bytes())
    config = json.loads((small / "adapter_config.json").read_text()) | {"r": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shown = run("inspect", folder)
    assert shown.exit_code == 1
    assert "r = 3" in shown.stdout
    assert "r = 3" in refused("spectrum", folder)
