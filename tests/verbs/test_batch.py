"""Several adapters in one call: what is written where, what fails, and that it is what the verb alone makes."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens import FormatError, LoraLensError, OptionError
from tests.conftest import small_adapter
from tests.marks import slow_except
from tests.verbs.batches import files_under, lay_adapters, spoil, statuses

WRITING: Mapping[str, Mapping[str, Any]] = {
    "compress": {"rank": 4},
    "convert": {"to": "kohya", "drop_extra": True},
    "scale": {"by": 0.5},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three trained adapters in the folder ``all`` of the working directory."""
    monkeypatch.chdir(tmp_path)
    lay_adapters(tmp_path / "all")
    return tmp_path


@pytest.mark.some(2)
@pytest.mark.parametrize("verb", WRITING)
def test_each_adapter_is_written_as_the_verb_alone_writes_it(verb: str, folder: Path) -> None:
    call = getattr(loralens, verb)
    for name in "abc":
        call(f"all/{name}", output=f"alone/{name}", **WRITING[verb])
    by_folder = call("all", output="by-folder", **WRITING[verb])
    by_list = call([Path("all/c"), "all/a", "all/b"], output="by-list", **WRITING[verb])
    assert statuses(by_folder) == {"a": "written", "b": "written", "c": "written"}
    assert [row.name for row in by_list] == ["c", "a", "b"]
    assert by_folder.answer
    assert files_under(Path("by-folder")) == files_under(Path("by-list")) == files_under(Path("alone"))


@pytest.mark.parametrize("verb", slow_except(WRITING, "scale"))
def test_the_number_of_jobs_changes_no_byte(verb: str, folder: Path) -> None:
    spoil(folder / "all" / "b")
    call = getattr(loralens, verb)
    results = [call("all", output=f"jobs-{jobs}", jobs=jobs, **WRITING[verb]) for jobs in (1, 2)]
    assert files_under(folder / "jobs-1") == files_under(folder / "jobs-2")
    records = [json.dumps(result.record()).replace("jobs-2", "jobs-1") for result in results]
    assert records[0] == records[1]


def test_numbers_of_a_row_are_those_of_the_verb_alone(folder: Path) -> None:
    row = loralens.compress(["all/a"], rank=4)[0]
    alone = loralens.compress("all/a", rank=4)
    assert row.status == "done"
    assert row.target is None
    numbers = {
        "modules": 12,
        "rank_before": 8,
        "rank_after": 4,
        "bytes_before": (folder / "all/a/adapter_model.safetensors").stat().st_size,
        "bytes_after": alone.bytes_after,
        "relative_error": alone.relative_error,
        "smaller": True,
    }
    assert row.numbers == numbers


def test_one_adapter_is_one_adapter(folder: Path) -> None:
    """Also a folder with checkpoints below it, and an adapter that PEFT has put into a folder of its name."""
    shutil.copytree("all/b", "all/a/checkpoint-10")
    shutil.copytree("all/b", "named/second")
    for source in ("all/a", Path("all/b/adapter_model.safetensors"), loralens.load("all/c"), "named"):
        assert isinstance(loralens.compress(source, rank=4).adapter, loralens.Adapter)
    (folder / "empty").mkdir()
    with pytest.raises(LoraLensError, match="holds no adapter file"):
        loralens.compress("empty", rank=4)


def test_the_folder_of_a_damaged_adapter_is_one_adapter(folder: Path) -> None:
    damaged = folder / "damaged"
    shutil.copytree(folder / "all" / "a", damaged)
    (damaged / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(FormatError, match="damaged"):
        loralens.compress(damaged, rank=1)
    # As of every single adapter, the doctor tells of the damage as a finding.
    assert [finding.code for finding in loralens.doctor(damaged).findings] == ["unreadable"]


def test_one_that_fails_does_not_stop_the_others(folder: Path) -> None:
    spoil(folder / "all" / "b")
    result = loralens.compress(["all/a", "all/b", "nowhere", "all/c"], output="out", rank=4)
    assert statuses(result) == {"a": "written", "b": "failed", "nowhere": "failed", "c": "written"}
    assert [row.answer for row in result] == [True, None, None, True]
    assert not result.answer
    assert "b and nowhere" in " ".join(result.conclusion())
    assert "safetensors" in result[1].reason
    assert result[1].fix
    assert result[2].reason.startswith("nowhere: ")
    assert {path.name for path in (folder / "out").iterdir()} == {"a", "c"}


def test_whole_models_and_the_output_folder_are_no_input(folder: Path) -> None:
    (folder / "all" / "model").mkdir()
    save_file({"embed.weight": np.zeros((4, 4), np.float32)}, folder / "all" / "model" / "model.safetensors")
    result = loralens.compress("all", output="all/out", rank=4)
    assert statuses(result) == {"a": "written", "b": "written", "c": "written"}
    again = loralens.compress("all", output="all/out", rank=4)
    assert statuses(again) == {"a": "exists", "b": "exists", "c": "exists"}


def test_a_link_to_an_adapter_of_the_folder_is_named_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "all" / "latest").symlink_to("b")
    (folder / "all" / "root").symlink_to(".")
    shutil.copytree("all/a", "elsewhere")
    (folder / "all" / "far").symlink_to(folder / "elsewhere")
    with caplog.at_level(logging.INFO, "loralens"):
        result = loralens.scale("all", 0.5, output="out")
        surveyed = loralens.survey("all")
    assert [row.name for row in result] == ["a", "b", "c", "far"]
    assert len(surveyed) == 4
    told = [each.getMessage() for each in caplog.records]
    assert told == ["all: a link to a folder that is read anyway is left out: latest → b"] * 2


def test_what_is_wrong_with_every_adapter_is_said_once(folder: Path) -> None:
    wrong: list[tuple[Callable[..., Any], Mapping[str, Any], str]] = [
        (loralens.compress, {}, "--rank"),
        (loralens.compress, {"error": 0.1, "energy": 0.5}, "exclude each other"),
        (loralens.scale, {}, "nothing says how much"),
        (loralens.convert, {"to": "none"}, "none"),
        (loralens.compress, {"rank": 4, "jobs": 0}, "jobs 0"),
        (loralens.compress, {"rank": 4, "base": "nowhere"}, "nowhere"),
        (loralens.compress, {"rank": 4, "output": "all/a/adapter_config.json"}, "is a file"),
        (loralens.compress, {"rank": 4, "output": "out.safetensors"}, "name of one file"),
        (loralens.compress, {"rank": 4, "output": "all/b/inside"}, "lies within the adapter"),
        (loralens.compress, {"rank": 4, "output": "all"}, "would be written over"),
    ]
    before = files_under(folder)
    for verb, options, message in wrong:
        with pytest.raises(OptionError, match=message):
            verb(["all/a", "all/b"], **{"output": "out", **options})
    assert files_under(folder) == before
    assert not (folder / "out").exists()


def test_the_output_is_not_the_folder_of_the_adapters_but_may_hold_it(folder: Path) -> None:
    with pytest.raises(OptionError, match="all is the folder of the adapters itself"):
        loralens.compress("all", output="all", rank=4)
    assert statuses(loralens.compress("all", output=".", rank=4)) == {"a": "written", "b": "written", "c": "written"}
    shutil.copytree("all/a", "all/all")
    with pytest.raises(OptionError, match="all is or holds the adapter all/a"):
        loralens.compress("all", output=".", rank=4)


def test_a_link_in_the_output_folder_leads_nowhere(folder: Path) -> None:
    shutil.copytree("all/b", "precious/b")
    loralens.compress("all", output="out", rank=4)
    shutil.rmtree("out/b")
    for link, end in (("out/b", "../precious/b"), ("out/b", "../nothing")):
        Path(link).symlink_to(end)
        with pytest.raises(OptionError, match="leads out of out by a link"):
            loralens.compress("all", output="out", rank=2, overwrite=True)
        Path(link).unlink()
    assert files_under(folder / "precious/b") == files_under(folder / "all/b")


def test_two_adapters_of_one_name_are_refused_before_anything_is_written(folder: Path) -> None:
    shutil.copytree("all/b", "other/a")
    with pytest.raises(OptionError, match=r"all/a and other/a have the same name, a"):
        loralens.compress(["all/b", "all/a", "other/a"], output="out", rank=4)
    assert not (folder / "out").exists()
    # The folder that holds both tells them apart.
    result = loralens.compress(".", output="out", rank=4)
    assert sorted(row.name for row in result) == ["all/a", "all/b", "all/c", "other/a"]


def test_single_files_stay_files_where_the_dialect_allows_it(folder: Path) -> None:
    adapter = small_adapter()
    for name in ("x.v1", "y"):
        loralens.save(adapter, folder / "loras" / f"{name}.safetensors", format="kohya")
    loralens.compress("loras", output="smaller", rank=1)
    assert sorted(files_under(folder / "smaller")) == ["x.v1.safetensors", "y.safetensors"]
    # PEFT's have a configuration beside them, of which a folder can have one.
    loralens.convert("loras", output="peft", to="peft")
    inside = ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(files_under(folder / "peft")) == [f"{name}/{file}" for name in ("x.v1", "y") for file in inside]
    loralens.convert("loras", output="loralib", to="loralib")
    assert {name.split("/")[0] for name in files_under(folder / "loralib")} == {"x.v1", "y"}
    assert len(loralens.load(folder / "peft" / "x.v1")) == len(adapter)


def test_two_files_that_would_become_one_are_refused(folder: Path) -> None:
    adapter = small_adapter()
    loralens.save(adapter, folder / "loras" / "x.safetensors", format="kohya")
    loralens.save(adapter, folder / "loras" / "x.bin", format="loralib")
    with pytest.raises(OptionError, match=r"loras/x.bin and loras/x.safetensors would both be written to out/x"):
        loralens.convert("loras", output="out", to="peft", scale=4)


@pytest.mark.parametrize("jobs", slow_except([1, 2], 1))
def test_checkpoints_within_an_adapters_folder_go_into_its_output(folder: Path, jobs: int) -> None:
    for step in (10, 20):
        shutil.copytree("all/b", f"all/a/checkpoint-{step}")
    result = loralens.scale("all", 2, output="out", jobs=jobs)
    names = {"a", "a/checkpoint-10", "a/checkpoint-20", "b", "c"}
    assert statuses(result) == dict.fromkeys(names, "written")
    assert loralens.equal("out/a/checkpoint-10", "out/b").answer
    assert statuses(loralens.scale("all", 2, output="out", jobs=jobs)) == dict.fromkeys(names, "exists")


def test_an_outer_adapter_that_comes_later_is_written_into_the_folder_that_is_there(folder: Path) -> None:
    shutil.copytree("all/b", "all/a/checkpoint-10")
    shutil.copytree("all/a", "kept")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "all/a" / name).unlink()
    assert set(statuses(loralens.scale("all", 2, output="out"))) == {"a/checkpoint-10", "b", "c"}
    shutil.copytree("kept", "all/a", dirs_exist_ok=True)
    result = loralens.scale("all", 2, output="out")
    assert statuses(result) == {"a": "written", "a/checkpoint-10": "exists", "b": "exists", "c": "exists"}


def test_adapters_in_memory_have_numbers_as_names(folder: Path) -> None:
    adapters = [loralens.load("all/a"), loralens.load("all/b")]
    result = loralens.scale(adapters, 0.5, output="out")
    assert statuses(result) == {"adapter-1": "written", "adapter-2": "written"}
    again = loralens.scale(adapters, 0.5, output="out", jobs=2)
    assert statuses(again) == {"adapter-1": "exists", "adapter-2": "exists"}


def test_an_answer_that_is_no_stays_no(folder: Path) -> None:
    options = {"rank": 8, "only_if_smaller": True, "output": "out"}
    result = loralens.compress(["all/a", "all/b"], **options)
    assert statuses(result) == {"a": "no", "b": "no"}
    assert not result.answer
    assert not result.failed
    assert result.conclusion()[-1] == "Not written, as it would not become smaller: a and b."
    assert not files_under(folder / "out")
    assert statuses(loralens.compress(["all/a", "all/b"], **options)) == {"a": "no", "b": "no"}
    unchanged = loralens.compress(["all/a", "all/b"], output="out", rank=8)
    assert statuses(unchanged) == {"a": "unchanged", "b": "unchanged"}
    assert unchanged.answer


def test_a_dry_run_writes_nothing_and_tells_what_is_done(folder: Path) -> None:
    result = loralens.compress("all", output="out", rank=4, dry_run=True)
    assert statuses(result) == {"a": "done", "b": "done", "c": "done"}
    assert not (folder / "out").exists()
    loralens.compress(["all/a", "all/b"], output="out", rank=4)
    before = files_under(folder)
    result = loralens.compress("all", output="out", rank=4, dry_run=True)
    assert statuses(result) == {"a": "exists", "b": "exists", "c": "done"}
    assert files_under(folder) == before


def test_failures_with_one_cause_are_told_once_without_paths(folder: Path) -> None:
    for name in ("a", "b", "c"):
        spoil(folder / "all" / name)
    result = loralens.scale("all", 0.5, output="out")
    assert result.sentences()[0].startswith("a, b and c: is a text")


def test_messages_are_kept_in_the_rows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "loralens"):
        loralens.scale("all/a", 0.5, output="alone")
        told = [f"note: {record.getMessage()}" for record in caplog.records]
        caplog.clear()
        result = loralens.scale("all", 0.5, output="out")
    assert told
    assert not caplog.records
    assert result[0].messages == told
    assert logging.getLogger("loralens").propagate
