"""`loralens.verify`: an answer, the verdict on every module, and what the command prints."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import FormatError
from loralens.choices import ModelDtype
from loralens.merging.verify import Verdict, relation
from loralens.verbs.merges.verify import VerifyResult
from tests.bases import MODULES, contents, single, tensors
from tests.cli.test_merge import done, run
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return single(tmp_path / "base", tensors())


def test_the_answer_is_yes_for_a_path_and_an_object(small: Path, base: Path, tmp_path: Path) -> None:
    loralens.merge((small, 0.5), base=base, output=tmp_path / "out")
    before = contents(tmp_path)
    for adapter in ((small, 0.5), {small_adapter(): 0.5}, [(str(small), 0.25), (small_adapter(), 0.25)]):
        result = loralens.verify(tmp_path / "out", base=base, adapter=adapter)
        assert (result.answer, result.verdict) == (True, "exact")
        assert [verdict.module for verdict in result.modules] == MODULES
    told = done("verify", tmp_path / "out", "--base", base, "--adapter", f"{small}:0.5", "--json").stdout
    assert json.loads(told) == {"loralens": loralens.__version__, **result.record()}
    assert contents(tmp_path) == before


def test_the_answer_is_no_and_the_exit_code_1(small: Path, base: Path, tmp_path: Path) -> None:
    loralens.merge(small, base=base, output=tmp_path / "out", modules=["q_proj"])
    result = loralens.verify(tmp_path / "out", base=base, adapter=small)
    assert (result.answer, result.verdict) == (False, "absent")
    words = ("verify", tmp_path / "out", "--base", base, "--adapter", small)
    shell = run(*words, "--csv")
    assert (shell.exit_code, shell.stdout) == (1, result.to_csv())
    assert [line.split(",")[0] for line in shell.stdout.splitlines()[1:]] == MODULES  # in natural order
    lines = run(*words).stdout.splitlines()
    assert [line.split()[1] for line in lines[5:7]] == ["absent"] * 2
    assert lines[7] == "4 modules in which every bit is as this merge writes it, -v shows all"
    assert loralens.verify(tmp_path / "out", base=base, adapter=small, modules=["q_proj"]).answer


def snapshot(path: Path, strength: float, turned: float) -> Path:
    """`small_adapter` times a strength, plus as much of other directions as `turned` times its norm."""
    rng = np.random.default_rng(0)
    modules = {}
    for name, module in small_adapter().items():
        D = strength * module.dense()
        E = rng.standard_normal(D.shape)
        # Orthogonal to D, so that the cosine with it is 1/√(1 + turned²).
        E -= np.vdot(E, D) / (np.vdot(D, D) or 1) * D
        B, s, A = np.linalg.svd(D + turned * np.linalg.norm(D) / np.linalg.norm(E) * E, full_matrices=False)
        modules[name] = loralens.LowRank((B * s).astype(np.float32), A.astype(np.float32))
    loralens.save(loralens.Adapter(modules=modules), path)
    return path


@pytest.mark.some(4)
@pytest.mark.parametrize(
    ("strength", "turned", "conclusion"),
    [
        (0.34, 0.0, "as it is, but the same directions at 0.34 of the strength: another weight, or another checkpoint"),
        (0.34, 0.2, "as it is, but the same directions at 0.34 of the strength: another weight, or another checkpoint"),
        (0.5, 1.0, "as it is, but similar directions (cosine 0.71) at 0.5 of the strength, as another checkpoint"),
        (-0.5, 0.0, ", but the same directions with the opposite sign at 0.5 of the strength."),
        (0.01, 100.0, ": what was added to the base has other directions (cosine 0.01)."),
        (0.0, 0.0, ": the weights are those of the base."),
    ],
)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_what_a_model_holds_instead(
    strength: float, turned: float, conclusion: str, dtype: ModelDtype, small: Path, tmp_path: Path
) -> None:
    # Weights so small that bfloat16 adds some noise to the update, and does not swallow it.
    base = single(tmp_path / "base", tensors(size=0.5))
    other = snapshot(tmp_path / "other", strength, turned)
    loralens.merge(other, base=base, output=tmp_path / "out", dtype=dtype)
    # The last v_proj of the adapter is 0, and so in every model.
    result = loralens.verify(tmp_path / "out", base=base, adapter=small, modules=MODULES[:5])
    told = result.conclusion()[0]
    between = "" if conclusion[0] in ",:" else " "
    assert told.startswith(f"{tmp_path / 'out'} does not hold {small}{between}{conclusion}")


def test_the_relation_is_that_of_the_dense_updates(small: Path, tmp_path: Path) -> None:
    base = single(tmp_path / "base", tensors(np.float32))
    other = snapshot(tmp_path / "other", 0.5, 1.0)
    loralens.merge(other, base=base, output=tmp_path / "out")
    found = relation(loralens.verify(tmp_path / "out", base=base, adapter=small).modules)
    D, E = (
        np.concatenate([module.dense().ravel() for module in adapter.modules.values()])
        for adapter in (loralens.load(small), loralens.load(other))
    )
    assert found is not None
    assert found.gain == pytest.approx(E @ D / (D @ D), rel=1e-4)
    assert found.cosine == pytest.approx(E @ D / np.sqrt((D @ D) * (E @ E)), rel=1e-4)


def test_without_base_and_adapter_the_certificate_tells_what_changed(small: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    loralens.merge((small, 0.5), base=base, output=out)
    before = contents(tmp_path)
    result = loralens.verify(out)
    assert (result.answer, result.changed, result.files_changed) == (True, [], [])
    merge = f"since the merge that the certificate describes (0.5 × {small} into {base})"
    assert done("verify", out, "-q").stdout == f"{out} is unchanged {merge}.\n"
    assert "exact" not in done("verify", out, "-v").stdout
    assert contents(tmp_path) == before

    held = load_file(out / "model.safetensors")
    held["model.norm.weight"][0] += held["model.norm.weight"].dtype.type(1)
    held["more"] = held.pop("lm_head.weight")
    save_file(held, out / "model.safetensors")
    (out / "config.json").write_text("{}")
    told = run("verify", out)
    assert told.exit_code == 1
    changed = "lm_head.weight, model.norm.weight, more"
    assert told.stdout.splitlines()[0] == f"{out}: 3 of 10 tensors changed {merge}: {changed}."
    assert "7 tensors unchanged" in told.stdout
    assert "note: gone, or of another size than at the merge: config.json, model.safetensors" in told.stdout
    record = json.loads(run("verify", out, "--json").stdout)
    assert {one["name"]: one["state"] for one in record["tensors"] if one["state"] != "unchanged"} == {
        "lm_head.weight": "missing",
        "model.norm.weight": "changed",
        "more": "added",
    }


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({}, "is not the certificate of a merge"),
        ({"result": 3}, "missing or damaged"),
        ({"result": {"sha256": None, "tensors": None}}, "missing or damaged"),
        ({"result": {"sha256": "", "tensors": {"a": {"dtype": 3, "shape": 4}}}}, "missing or damaged"),
        ({"adapters": [3]}, "missing or damaged"),
    ],
)
def test_a_damaged_certificate(
    spoilt: dict[str, object], message: str, small: Path, base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out" / "merge_certificate.json"
    loralens.merge(small, base=base, output=tmp_path / "out")
    file.write_text(json.dumps({**json.loads(file.read_text()), **spoilt} if spoilt else {}))
    with pytest.raises(FormatError, match=message):
        loralens.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "has no certificate of a merge"),
        (["--base", "x"], "--base is given without --adapter"),
        (["--adapter", "x"], "--adapter is given without --base"),
        (["-m", "x"], "--modules is only used with --base and --adapter"),
    ],
)
def test_half_a_question_is_an_error(words: list[str], message: str, base: Path) -> None:
    refused = run("verify", base, *words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert message in refused.stderr


def test_an_exact_merge_that_is_mostly_noise_is_not_called_the_adapter() -> None:
    def told(*verdicts: Verdict) -> str:
        (sentence,) = VerifyResult("out", "base", "stochastic", verdicts, [], ["chat"]).conclusion()
        return sentence

    noisy = Verdict("q", "exact", gain=0.9, predicted=0.9, error=3.0, different=0, norm=1.0, noise=3.0)
    quiet = Verdict("v", "exact", gain=1.0, predicted=1.0, error=0.1, different=0, norm=2.0, noise=0.1)
    assert told(quiet) == "out holds chat exactly."
    # √((3² · 1² + 0.1² · 2²) / (1² + 2²)) and (0.9 · 1² + 1 · 2²) / (1² + 2²)
    expected = "a gain of 0.980, and adds an error of 1.345 times the update"
    assert told(noisy, quiet) == f"out is the merge of chat, bit for bit; rounding leaves {expected}."
