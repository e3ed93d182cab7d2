"""Several adapters in one call: what is written where, what fails, and that it is what the verb alone makes."""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.errors import FormatError, LoraLensError, OptionError
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.sizes.compress import CompressResult
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
    assert isinstance(by_folder, BatchResult)
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


def test_one_adapter_is_one_adapter(folder: Path) -> None:
    """Also a folder with checkpoints below it, and an adapter that PEFT has put into a folder of its name."""
    shutil.copytree("all/b", "all/a/checkpoint-10")
    shutil.copytree("all/b", "named/second")
    for source in ("all/a", Path("all/b/adapter_model.safetensors"), loralens.load("all/c"), "named"):
        assert isinstance(loralens.compress(source, rank=4), CompressResult)
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
    assert "no such file" in result[2].reason
    assert {path.name for path in (folder / "out").iterdir()} == {"a", "c"}


def test_a_loose_file_beside_folders_of_adapters_is_one_of_several(folder: Path) -> None:
    loralens.convert("all/a", to="kohya", output="all/style.safetensors", drop_extra=True)
    assert set(statuses(loralens.doctor("all"))) == {"a", "b", "c", "style.safetensors"}
    # As an adapter the folder is refused, as one that holds several files is.
    with pytest.raises(LoraLensError, match=r"all: the folder holds several candidates: style\.safetensors, a/"):
        loralens.inspect("all")


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
        (loralens.compress, {"rank": 4, "energy": 0.5}, "exclude each other"),
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


def test_a_dtype_alone_keeps_the_dialect_of_each(folder: Path) -> None:
    loralens.convert("all/b", to="kohya", output="all/style.safetensors", drop_extra=True)
    result = loralens.convert("all", dtype="bf16", output="out")
    formats = {row.name: (row.number("format_before"), row.number("format")) for row in result}
    assert formats.pop("style.safetensors") == ("kohya", "kohya")
    assert set(formats.values()) == {("peft", "peft")}
    for name in ("a", "style.safetensors"):
        dtypes = {str(module.dtype) for module in loralens.load(f"out/{name}").modules.values()}
        assert dtypes == {"bfloat16"}
    with pytest.raises(OptionError, match=r"nothing says what to convert to\n  fix: give --to \(peft, "):
        loralens.convert("all", output="none")
    with pytest.raises(OptionError, match="nothing says what to convert to"):
        loralens.convert("all/a")


@pytest.mark.parametrize("jobs", slow_except([1, 2], 1))
def test_checkpoints_within_an_adapters_folder_go_into_its_output(folder: Path, jobs: int) -> None:
    for step in (10, 20):
        shutil.copytree("all/b", f"all/a/checkpoint-{step}")
    result = loralens.scale("all", 2, output="out", jobs=jobs)
    names = {"a", "a/checkpoint-10", "a/checkpoint-20", "b", "c"}
    assert statuses(result) == dict.fromkeys(names, "written")
    assert loralens.equal("out/a/checkpoint-10", "out/b").answer
    assert statuses(loralens.scale("all", 2, output="out", jobs=jobs)) == dict.fromkeys(names, "exists")


def test_adapters_in_memory_have_numbers_as_names(folder: Path) -> None:
    adapters = [loralens.load("all/a"), loralens.load("all/b")]
    result = loralens.scale(adapters, 0.5, output="out")
    assert statuses(result) == {"adapter-1": "written", "adapter-2": "written"}
    again = loralens.scale(adapters, 0.5, output="out", jobs=2)
    assert statuses(again) == {"adapter-1": "exists", "adapter-2": "exists"}


def test_a_dry_run_writes_nothing_and_tells_what_is_done(folder: Path) -> None:
    result = loralens.compress("all", output="out", rank=4, dry_run=True)
    assert statuses(result) == {"a": "done", "b": "done", "c": "done"}
    assert not (folder / "out").exists()
    loralens.compress(["all/a", "all/b"], output="out", rank=4)
    before = files_under(folder)
    result = loralens.compress("all", output="out", rank=4, dry_run=True)
    assert statuses(result) == {"a": "exists", "b": "exists", "c": "done"}
    assert files_under(folder) == before
