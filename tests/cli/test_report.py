"""``loralens report``: what is written where, what is refused, and the numbers."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file

import loralens
from loralens.cli.main import main
from loralens.core.fingerprint import fingerprint
from loralens.core.stored import Moment, Moments
from loralens.formats.records.results import save_moments
from loralens.tables.numbers import percent
from tests.reporting.adapters import NAMES, drawn

PNG = b"\x89PNG"


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, args)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def first(tmp_path: Path) -> Path:
    loralens.save(drawn(1), tmp_path / "first")
    return tmp_path / "first"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    loralens.save(drawn(2), tmp_path / "second")
    return tmp_path / "second"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose weights have the shapes of the adapters."""
    rng = np.random.default_rng(5)
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {
        f"{name}.weight": rng.standard_normal(module.shape).astype(np.float32) for name, module in drawn(1).items()
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def test_the_page_is_written_into_a_folder_that_it_makes(first: Path, tmp_path: Path) -> None:
    target = tmp_path / "reports" / "x.html"
    result = run(first, "-o", target)
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        f"Wrote {target}: Rank 4 of 6 keeps 99.3 % of the energy, and the file would be 27 % smaller.\n",
        "",
    )
    text = target.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert f"loralens report {first} -o {target}" in text
    assert names(target.parent) == ["x.html"]


@pytest.mark.slow
def test_same_adapters_same_bytes(first: Path, second: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.html", tmp_path / "two.html"
    commands = [(first, "-o", one, "--markdown"), (first, second, "-o", two)]
    for command in commands:
        assert run(*command).exit_code == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {one, two, tmp_path / "one.md"} < set(before)
    for command in commands:
        result = run(*command, "--overwrite")
        assert result.exit_code == 0, result.stderr
    assert {path: path.read_bytes() for path in before} == before


def test_markdown_has_its_pictures_beside_it(first: Path, tmp_path: Path) -> None:
    result = run(first, "-o", tmp_path / "x.html", "--markdown")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in (tmp_path / "x_files").iterdir())
    assert files == [f"{name}-1.png" for name in ("curve", "energy", "ranks", "shares", "spectra")]
    for name in files:
        assert f"(x_files/{name})" in text
        assert (tmp_path / "x_files" / name).read_bytes().startswith(PNG)


def test_json_has_the_numbers_of_the_other_commands(first: Path, second: Path) -> None:
    record = json.loads(run(first, second, "--json").stdout)
    assert set(record) == {
        "loralens", "base", "command", "activations", "chosen", "evaluations", "headline", "verdicts", "summary",
        "findings", "adapters", "together", "run",
    }  # fmt: skip
    told = json.loads(CliRunner().invoke(main, ["spectrum", str(first), "--json"]).stdout)["adapters"][0]
    for mine, theirs in zip(record["adapters"][0]["modules"], told["modules"], strict=True):
        assert mine["singular_values"] == pytest.approx(theirs["singular_values"], rel=1e-10)
        assert mine["energy_rank"] == theirs["energy_rank"]
        for measure in ("effective_rank_energy", "participation_ratio"):
            assert mine[measure] == pytest.approx(theirs[measure], rel=1e-10)
    doctor = json.loads(CliRunner().invoke(main, ["doctor", str(first), str(second), "--json"]).stdout)
    assert record["findings"] == doctor["findings"]
    curve = json.loads(CliRunner().invoke(main, ["curve", str(first), "--json"]).stdout)
    for mine, theirs in zip(record["adapters"][0]["curve"], curve["points"], strict=True):
        assert mine["uniform"]["bytes"] == theirs["uniform"]["bytes"]
        assert mine["budget"]["error"] == pytest.approx(theirs["budget"]["relative_error"])
    pair = json.loads(CliRunner().invoke(main, ["similarity", str(first), str(second), "--json"]).stdout)
    assert record["together"]["cosine"][0][1] == pytest.approx(pair["cosine"][0][1], abs=1e-12)
    assert record["run"] is None


def test_a_base_adds_its_section(first: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = run(first, "--base", base, "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    module = record["adapters"][0]["modules"][0]
    told = CliRunner().invoke(main, ["amplify", str(first), "--base", str(base), "--no-top", "--json"])
    theirs = json.loads(told.stdout)["modules"][0]
    assert module["amplification"]["amplification"] == pytest.approx(theirs["amplification"])
    assert module["amplification"]["z"] == pytest.approx(theirs["z"])
    found = CliRunner().invoke(main, ["intruders", str(first), "--base", str(base), "--json"])
    assert module["intruders"]["count"] == json.loads(found.stdout)["modules"][0]["count"]
    assert 0 <= module["merge"]["error"] < 1
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert all(word in text for word in ("Against the base", "Intruder dimensions", "Merge fidelity, predicted"))


def test_modules_of_another_base_are_findings(first: Path, base: Path, tmp_path: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights[f"{NAMES[0]}.weight"]
    save_file(weights, base / "model.safetensors")
    result = run(first, "--base", base, "--no-intruders", "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert any(one["module"] == NAMES[0] for one in record["findings"])
    assert "amplification" not in record["adapters"][0]["modules"][0]
    assert "have no weight in this base" in (tmp_path / "x.html").read_text()


def test_checkpoints_of_one_run_have_their_section(tmp_path: Path) -> None:
    adapter = drawn(1)
    for step, strength in ((10, 0.5), (20, 1.0), (30, 1.1)):
        loralens.save(adapter * strength, tmp_path / "run" / f"checkpoint-{step}")
    state = {"global_step": 30, "log_history": [{"step": s, "loss": 3.0 - s / 30} for s in (10, 20, 30)]}
    (tmp_path / "run" / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    result = run(tmp_path / "run", "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert [one["step"] for one in record["run"]["checkpoints"]] == [10, 20, 30]
    assert record["run"]["settled"] == 10
    assert record["run"]["losses"]["loss"][0] == [10, pytest.approx(3.0 - 1 / 3)]
    assert "3 checkpoints of one run" in " ".join(record["summary"])
    assert "From checkpoint to checkpoint" in (tmp_path / "x.html").read_text(encoding="utf-8")


def test_adapters_of_several_runs_are_no_run(tmp_path: Path) -> None:
    for step in (10, 20):
        loralens.save(drawn(step), tmp_path / f"checkpoint-{step}")
    result = run(tmp_path / "checkpoint-10", tmp_path / "checkpoint-20", "--json")
    assert json.loads(result.stdout)["run"] is None


def test_an_adapter_with_nan_is_a_page_with_a_finding(first: Path, tmp_path: Path) -> None:
    tensors = load_file(first / "adapter_model.safetensors")
    key = next(key for key in tensors if NAMES[1] in key)
    tensors[key] = np.full_like(tensors[key], np.nan)
    save_file(tensors, first / "adapter_model.safetensors", metadata={"format": "pt"})
    result = run(first, "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["adapters"][0]["left_out"] == [NAMES[1]]
    assert "1 error" in record["summary"][0]


@pytest.mark.parametrize("there", ["x.html", "x.md", "x_files"])
def test_nothing_is_replaced_unasked(first: Path, tmp_path: Path, there: str) -> None:
    if there == "x_files":
        (tmp_path / there).mkdir()
    else:
        (tmp_path / there).write_text("mine")
    result = run(first, "-o", tmp_path / "x.html", "--markdown")
    assert result.exit_code == 2
    assert f"{tmp_path / there}: exists" in result.stderr
    assert names(tmp_path) == sorted(["first", there])


def test_a_folder_of_other_things_is_not_replaced_even_when_asked(first: Path, tmp_path: Path) -> None:
    (tmp_path / "x_files").mkdir()
    (tmp_path / "x_files" / "thesis.tex").write_text("mine")
    result = run(first, "-o", tmp_path / "x.html", "--markdown", "--overwrite")
    assert result.exit_code == 2
    assert "holds files that are not pictures, such as thesis.tex" in result.stderr
    assert (tmp_path / "x_files" / "thesis.tex").read_text() == "mine"


def test_a_report_that_cannot_be_made_leaves_nothing(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loralens.reporting.writing.tidy", full)
    result = run(first, "-o", tmp_path / "x.html", "--markdown")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert names(tmp_path) == ["first"]


def test_an_unreadable_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"xx")
    result = run(tmp_path / "bad.safetensors", "-o", tmp_path / "x.html")
    assert result.exit_code == 2
    assert "fix:" in result.stderr
    assert not (tmp_path / "x.html").exists()


def activations(path: Path, target: Path) -> Path:
    """Moments of the adapter at ``path``, its directions excited unequally."""
    adapter = loralens.load(path)
    moments = {name: Moment(np.diag(10.0 ** -np.arange(module.rank)), 30) for name, module in adapter.items()}
    save_moments(Moments(modules=moments, fingerprint=fingerprint(adapter)), target)
    return target


def test_errors_on_data_are_called_so_beside_that_of_the_update(first: Path, tmp_path: Path) -> None:
    file = activations(first, tmp_path / "act.safetensors")
    result = run(first, "--activations", file, "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    said = next(one for one in record["summary"] if "squared output on the inputs given (30 positions; error" in one)
    assert " of ΔW itself)" in said
    assert "of the energy" not in said
    adapter = record["adapters"][0]
    best = adapter["recommended_rank"]
    args = ["compress", str(first), "-o", str(tmp_path / "small"), "--rank", str(best), "--activations", str(file)]
    told = json.loads(CliRunner().invoke(main, [*args, "--json"]).stdout)["total"]
    assert adapter["plain_error"] == pytest.approx(told["relative_error"], abs=1e-6)  # float32 factors
    assert f"{percent(adapter['plain_error'])} of ΔW itself" in said
    text = (tmp_path / "x.html").read_text()
    assert "<dt>output kept</dt>" in text
    assert "<dt>energy kept</dt>" not in text


def test_each_file_of_activations_finds_its_adapter(first: Path, second: Path, tmp_path: Path) -> None:
    one, two = (activations(path, tmp_path / f"{path.name}.safetensors") for path in (first, second))
    result = run(first, second, "--activations", two, "-o", tmp_path / "x.html", "--json")
    assert result.exit_code == 0, result.stderr
    assert f"warning: {first}: none of the activations belong to this adapter" in result.stderr
    told = [record["activations"] for record in json.loads(result.stdout)["adapters"]]
    assert told == [None, str(two)]
    assert (
        "No activations were given for first, so their errors are those of ΔW itself."
        in (tmp_path / "x.html").read_text()
    )
    result = run(first, second, "--activations", two, "--activations", one, "--json")
    assert "warning" not in result.stderr
    told = [record["activations"] for record in json.loads(result.stdout)["adapters"]]
    assert told == [str(one), str(two)]
    result = run(first, "--activations", two, "--json")
    assert result.exit_code == 2
    assert f"{two}: these activations belong to another adapter" in result.stderr


@pytest.fixture
def course(tmp_path: Path) -> Path:
    for step in (3, 20):
        loralens.save(drawn(step), tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def test_every_folder_of_a_run_stands_for_its_checkpoints(first: Path, course: Path) -> None:
    result = run(first, course, course / "checkpoint-3", "--json")
    assert result.exit_code == 0, result.stderr
    paths = [Path(one["path"]) for one in json.loads(result.stdout)["adapters"]]
    assert paths == [first, course / "checkpoint-3", course / "checkpoint-20"]


def test_a_folder_of_adapters_that_is_no_run_says_how_to_give_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        loralens.save(drawn(1), tmp_path / "many" / name)
    result = run(tmp_path / "many", "--json")
    assert result.exit_code == 2
    assert f"{tmp_path / 'many'}: is not a training run, and holds 2 adapters" in result.stderr
    assert f"give each: loralens report {tmp_path / 'many' / 'a'} {tmp_path / 'many' / 'b'}" in result.stderr


def test_a_link_to_nothing_is_there(first: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").symlink_to(tmp_path / "nowhere.html")
    result = run(first, "-o", tmp_path / "x.html")
    assert result.exit_code == 2
    assert "x.html: exists" in result.stderr
    assert (tmp_path / "x.html").is_symlink()
