"""``loralens doctor``: exact output, the JSON contract, SARIF, and the exits."""

import json
import re
import shlex
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests import conftest
from tests.cli.command import Command

run, told = Command().run, Command().told


def small_adapter() -> loralens.Adapter:
    """That of `conftest`, its directions turned, so that no two modules are one and no row is zero; one B is 0."""
    rng = np.random.default_rng(0)

    def turned(module: loralens.LowRank) -> loralens.LowRank:
        P, Q = (np.linalg.qr(rng.standard_normal((n, n)))[0].astype(np.float32) for n in module.shape)
        return loralens.LowRank(P @ module.B, module.A @ Q, module.scale, scaling=module.scaling)

    return conftest.small_adapter().map(turned)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "small"
    loralens.save(small_adapter(), folder)
    return folder


TEXT = """\
1 warning about PATH: zero-update.

PATH (6 modules): 1 warning
  warning: zero-update: model.layers.10.self_attn.v_proj: B is all zero
    fix: never trained: check `target_modules` in the training code; or leave them out: `loralens compress PATH -o \
PATH-trained --energy 1 --drop-dead`

"""


def test_text_is_exactly_this(small: Path) -> None:
    result = run("doctor", small)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.replace(str(small), "PATH") == TEXT


def test_json_keeps_its_contract(small: Path) -> None:
    record = told("doctor", small)
    assert record["loralens"] == loralens.__version__
    (finding,) = record["findings"]
    assert set(finding) == {"level", "code", "adapter", "module", "evidence", "fix"}
    assert (finding["level"], finding["code"], finding["adapter"]) == ("warning", "zero-update", str(small))
    assert finding["module"] == "model.layers.10.self_attn.v_proj"


def test_a_file_that_cannot_be_read_is_a_finding_and_the_others_are_examined(small: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no")
    result = run("doctor", broken, small, "--json")
    findings = json.loads(result.stdout)["findings"]
    assert [(one["level"], one["code"], one["adapter"]) for one in findings] == [
        ("error", "unreadable", str(broken)),
        ("warning", "zero-update", str(small)),
    ]
    assert run("doctor", broken).stdout.startswith(
        f"1 error about {broken}: unreadable.\n\n{broken} (not read): 1 error\n  error: unreadable: 2 bytes are too"
    )


def test_findings_of_one_kind_are_told_together(small: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    large = np.full((6, 4), 3000.0, ml_dtypes.bfloat16)  # ulp 16: an update of 4 moves nothing
    save_file({f"{name}.weight": large for name in small_adapter()}, base / "model.safetensors")
    text = run("doctor", small, "--base", base).stdout
    assert text.startswith(f"2 warnings about {small}: zero-update, below-rounding.\n")
    assert f"\n{small} (6 modules, against {base}): 2 warnings\n" in text
    assert "  warning: below-rounding: 5 of 6 modules\n    model.layers.0.self_attn.q_proj: ‖ΔW‖ is 0.2 times" in text
    assert "a merge into bfloat16 keeps 0 % of its strength with an error of 100 %, and leaves 100 % of" in text
    assert "    and 2 more (--verbose names them)\n" in text
    assert "more (--" not in run("doctor", small, "--base", base, "--verbose").stdout
    first = run("doctor", small, "--base", base, "--top", "1").stdout
    assert "zero-update: " in first
    assert "below-rounding: " not in first
    assert "1 more cause (--verbose shows all)" in first
    assert text.count("fix: keep float32 when merging (`loralens merge --dtype f32`)") == 1
    findings = told("doctor", small, "--base", base)["findings"]
    assert [one["code"] for one in findings] == ["zero-update"] + ["below-rounding"] * 5
    wide = told("doctor", small, "--base", base, "--dtype", "f32")["findings"]
    assert [one["code"] for one in wide] == ["zero-update"]


def test_sarif_names_the_file_and_stays_the_same(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.parent)
    first = run("doctor", small, "--sarif", tmp_path / "a.sarif")
    assert (first.exit_code, first.stderr) == (0, f"Wrote {tmp_path / 'a.sarif'}.\n")
    run("doctor", "small", "--sarif", tmp_path / "b.sarif")
    text = (tmp_path / "a.sarif").read_text(encoding="utf-8")
    (result,) = json.loads(text)["runs"][0]["results"]
    location = result["locations"][0]
    assert location["physicalLocation"]["artifactLocation"]["uri"] == "small/adapter_model.safetensors"
    assert location["logicalLocations"][0]["fullyQualifiedName"] == "model.layers.10.self_attn.v_proj"
    other = (tmp_path / "b.sarif").read_text(encoding="utf-8")
    assert other == text.replace(str(small), "small")


def test_a_command_repeats_the_options_of_reading(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    A = np.linalg.qr(rng.standard_normal((20, 8)))[0].T
    B = rng.standard_normal((20, 8)) * 0.1 ** np.arange(8)
    modules = {f"model.layers.{i}.mlp.up_proj": loralens.LowRank(B, A) for i in range(4)}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "run", format="loralib")
    result = run("doctor", tmp_path / "run", "--format", "loralib")
    (command,) = re.findall(r"`loralens (compress [^`]*)`", result.stdout)
    assert command.endswith("--energy 0.99 --format loralib")
    Command().good(*shlex.split(command))
