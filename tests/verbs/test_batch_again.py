"""A batch that is repeated: what is skipped, what is done again, and what is never replaced."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.errors import FormatError, OptionError
from loralens.formats.files.hold import Hold
from loralens.formats.files.location import RECORD_NAME
from loralens.formats.records.batches import BatchRecord, files_digest, read_entry
from tests.verbs.batches import files_under, lay_adapters, outputs_under, read_record, statuses, write_record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two trained adapters in ``all``, scaled by a half into ``out``."""
    monkeypatch.chdir(tmp_path)
    lay_adapters(tmp_path / "all", "20newsgroups-r8-seed0", "reuters-r8-r8-seed0")
    assert statuses(scale()) == {"a": "written", "b": "written"}
    return tmp_path


def scale(by: float = 0.5, **options: Any) -> Any:
    return loralens.scale("all", by, output="out", **options)


def weights(name: str) -> Path:
    return Path("out") / name / "adapter_model.safetensors"


def test_what_is_done_is_skipped(folder: Path) -> None:
    times = [weights(name).stat().st_mtime_ns for name in "ab"]
    before = files_under(folder)
    again = scale()
    assert statuses(again) == {"a": "skipped", "b": "skipped"}
    assert [row.number("modules") for row in again] == [12, 12]
    assert files_under(folder) == before
    assert [weights(name).stat().st_mtime_ns for name in "ab"] == times
    # Also with --overwrite, and under another name of the same place.
    assert statuses(scale(overwrite=True)) == {"a": "skipped", "b": "skipped"}
    assert statuses(loralens.scale(folder / "all", 0.5, output=folder / "out")) == {"a": "skipped", "b": "skipped"}


def test_a_new_adapter_alone_is_done(folder: Path) -> None:
    shutil.copytree("all/b", "all/c")
    assert statuses(scale()) == {"a": "skipped", "b": "skipped", "c": "written"}


def _retrain(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _other_alpha(path: Path) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


CHANGES: dict[str, Callable[[], None]] = {
    "a number": lambda: _retrain(Path("all/b/adapter_model.safetensors")),
    "the configuration": lambda: _other_alpha(Path("all/b/adapter_config.json")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_adapter_that_has_changed_is_done_again(change: str, folder: Path) -> None:
    before = files_under(folder / "out")
    CHANGES[change]()
    assert statuses(scale()) == {"a": "skipped", "b": "written"}
    assert files_under(folder / "out") != before
    loralens.scale("all/b", 0.5, output="alone")
    assert (folder / "alone/adapter_model.safetensors").read_bytes() == weights("b").read_bytes()


def test_other_options_do_everything_again(folder: Path) -> None:
    assert statuses(scale(0.25)) == {"a": "written", "b": "written"}
    alone = loralens.scale("all/a", 0.25).adapter
    assert loralens.equal(loralens.load("out/a"), alone).answer
    assert statuses(scale(0.25, modules=["query"])) == {"a": "written", "b": "written"}
    assert statuses(scale(0.25, modules=["query"])) == {"a": "skipped", "b": "skipped"}


def test_the_content_of_a_file_that_an_option_names_counts(folder: Path) -> None:
    (folder / "weights.json").write_text('{"*query": 1}')
    options: dict[str, Any] = {"output": "small", "parameters": 0.5, "weights": "weights.json"}
    assert statuses(loralens.compress("all", **options)) == {"a": "written", "b": "written"}
    assert statuses(loralens.compress("all", **options)) == {"a": "skipped", "b": "skipped"}
    (folder / "weights.json").write_text('{"*query": 100}')
    assert statuses(loralens.compress("all", **options)) == {"a": "written", "b": "written"}


def test_an_output_that_is_gone_is_written_again(folder: Path) -> None:
    shutil.rmtree("out/a")
    assert statuses(scale()) == {"a": "written", "b": "skipped"}


SPOILED: dict[str, Callable[[], object]] = {
    "half": lambda: weights("a").write_bytes(weights("a").read_bytes()[:1000]),
    "edited": lambda: _retrain(weights("a")),
    "configuration": lambda: _other_alpha(Path("out/a/adapter_config.json")),
    "another beside it": lambda: shutil.copy(weights("b"), "out/a/adapters.safetensors"),
}


@pytest.mark.some(3)
@pytest.mark.parametrize("spoiled", SPOILED)
def test_an_output_that_is_not_what_was_written_is_neither_skipped_nor_replaced(spoiled: str, folder: Path) -> None:
    SPOILED[spoiled]()
    before = outputs_under(folder / "out")
    result = scale()
    assert statuses(result) == {"a": "failed", "b": "skipped"}
    assert "exists" in result[0].reason
    assert "--overwrite" in result[0].fix
    assert outputs_under(folder / "out") == before
    if spoiled != "another beside it":  # which the verb alone refuses too
        assert statuses(scale(overwrite=True)) == {"a": "written", "b": "skipped"}
        assert statuses(scale()) == {"a": "skipped", "b": "skipped"}


def test_a_readme_in_an_output_changes_nothing_and_stays(folder: Path) -> None:
    (folder / "out/a/README.md").write_text("mine")
    assert statuses(scale()) == {"a": "skipped", "b": "skipped"}
    scale(0.25)
    assert (folder / "out/a/README.md").read_text() == "mine"


def test_what_no_record_vouches_for_is_not_replaced(folder: Path) -> None:
    (folder / "out" / RECORD_NAME).unlink()
    before = outputs_under(folder / "out")
    result = scale()
    assert statuses(result) == {"a": "failed", "b": "failed"}
    assert "exists" in result[0].reason
    assert outputs_under(folder / "out") == before


def test_the_output_of_another_adapter_or_verb_is_not_replaced(folder: Path) -> None:
    before = outputs_under(folder / "out")
    lay_adapters(folder / "others", "tweet-sentiment-r8-seed0", "tweet-sentiment-r8-seed0")
    assert statuses(loralens.scale("others", 0.5, output="out")) == {"a": "failed", "b": "failed"}
    assert statuses(loralens.compress("all", rank=4, output="out")) == {"a": "failed", "b": "failed"}
    assert outputs_under(folder / "out") == before
    assert statuses(scale()) == {"a": "skipped", "b": "skipped"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_output_folder_does_not_become_an_adapter(overwrite: bool, folder: Path) -> None:
    loralens.compress("all", output="out", rank=4)
    before = files_under(folder / "out")
    for verb, options in (("compress", {"rank": 2}), ("scale", {"by": 2}), ("convert", {"to": "peft"})):
        with pytest.raises(
            OptionError, match="would become one adapter\n  fix: choose a target in it, such as out/NAME"
        ):
            getattr(loralens, verb)("all/a", output="out", overwrite=overwrite, **options)
    assert files_under(folder / "out") == before
    loralens.compress("all/a", output="out/d", rank=2)


def test_an_adapter_that_was_moved_is_still_done(folder: Path) -> None:
    shutil.move("all", "elsewhere")
    result = loralens.scale("elsewhere", 0.5, output="out")
    assert statuses(result) == {"a": "skipped", "b": "skipped"}


@pytest.mark.parametrize("entry", ["begun", "of before"])
def test_an_output_whose_run_was_killed_before_the_record_is_recognised(entry: str, folder: Path) -> None:
    """The run was killed between the last rename and the record; nothing else says that the output is its own."""
    record = read_record(folder / "out")
    begun = {"status": "begun", "input": None, "options": None, "numbers": None}
    record["entries"]["a"] |= {"output": None, **begun} if entry == "begun" else {"output": "0" * 64}
    write_record(folder / "out", record)
    before = outputs_under(folder / "out")
    assert statuses(scale()) == {"a": "written", "b": "skipped"}
    assert outputs_under(folder / "out") == before
    assert statuses(scale()) == {"a": "skipped", "b": "skipped"}


def test_another_output_in_its_place_is_not_taken_for_it(folder: Path) -> None:
    record = read_record(folder / "out")
    record["entries"]["a"] |= {"status": "begun", "output": None}
    write_record(folder / "out", record)
    _retrain(weights("a"))
    before = outputs_under(folder / "out")
    assert statuses(scale()) == {"a": "failed", "b": "skipped"}
    assert outputs_under(folder / "out") == before


def test_two_runs_do_not_write_into_one_folder(folder: Path) -> None:
    hold = Hold()
    hold.take(folder / "out")
    with pytest.raises(OptionError, match="a run is going on"):
        scale()
    hold.release()
    assert statuses(scale()) == {"a": "skipped", "b": "skipped"}


BROKEN = {
    "text": b"no JSON",
    "list": b"[]",
    "another form": b'{"loralens_batch": 2, "entries": {}}',
    "no entries": b'{"loralens_batch": 1, "entries": []}',
    "a name twice": b'{"loralens_batch": 1, "entries": {}, "entries": {}}',
    "nested": b"[" * 100_000,
}


@pytest.mark.some(4)
@pytest.mark.parametrize("content", BROKEN)
def test_a_record_that_is_none_stops_the_run_before_anything_is_written(content: str, folder: Path) -> None:
    (folder / "out" / RECORD_NAME).write_bytes(BROKEN[content])
    before = files_under(folder)
    with pytest.raises(FormatError, match=RECORD_NAME):
        scale(0.25)
    assert files_under(folder) == before


def test_a_record_that_is_a_link_is_not_written_through(folder: Path) -> None:
    (folder / "precious").write_text("mine")
    for target in ("precious", "nothing"):
        (folder / "out" / RECORD_NAME).unlink()
        (folder / "out" / RECORD_NAME).symlink_to(folder / target)
        with pytest.raises(FormatError, match="not a regular file"):
            scale()
    assert (folder / "precious").read_text() == "mine"


HOSTILE: dict[str, dict[str, object]] = {
    "a key more": {"more": 1},
    "status": {"status": "perfect"},
    "digest": {"output": "../../etc/passwd"},
    "digest of another kind": {"input": 7},
    "text that moves the cursor": {"verb": "scale\x1b[2J"},
    "messages": {"messages": [1]},
    "many messages": {"messages": [""] * 1000},
    "numbers": {"numbers": [1, 2]},
    "no number": {"numbers": {"modules": "twelve", "format": "peft", "bytes": 1}},
    "a number less": {"numbers": {"modules": 12}},
    "text in numbers": {"numbers": {"modules": 12, "format": "peft\x1b[2J", "bytes": 1}},
    "beyond float64": {"numbers": {"modules": 10**400, "format": "peft", "bytes": 1}},
    "infinite": {"numbers": {"modules": 12, "format": "peft", "bytes": float("inf")}},
}


@pytest.mark.some(3)
@pytest.mark.parametrize("change", HOSTILE)
def test_an_entry_that_is_none_is_not_believed(change: str, folder: Path) -> None:
    record = read_record(folder / "out")
    record["entries"]["a"] |= HOSTILE[change]
    write_record(folder / "out", record)
    before = outputs_under(folder / "out")
    result = scale()
    # An entry that is damaged vouches for nothing; one whose numbers alone are wrong still tells whose the output is.
    assert statuses(result)["a"] == ("written" if isinstance(HOSTILE[change].get("numbers"), dict) else "failed")
    assert statuses(result)["b"] == "skipped"
    assert outputs_under(folder / "out") == before


@pytest.mark.skipif(os.name == "nt", reason="names are bytes")
def test_names_that_are_no_text_are_recorded_too(folder: Path) -> None:
    for name in (b"a\xff", b"a\x1b[2J"):
        shutil.copytree("all/a", Path("all") / os.fsdecode(name))
    assert set(statuses(scale()).values()) == {"skipped", "written"}
    assert set(statuses(scale()).values()) == {"skipped"}


def test_names_in_a_record_lead_nowhere(folder: Path) -> None:
    record = read_record(folder / "out")
    entry = record["entries"]["a"]
    record["entries"] |= {"../all/a": entry, "/etc/passwd": entry, "a/../b": entry}
    write_record(folder / "out", record)
    before = files_under(folder / "all")
    assert statuses(scale(0.25)) == {"a": "written", "b": "written"}
    assert files_under(folder / "all") == before


def test_an_entry_is_read_as_it_was_written(folder: Path) -> None:
    for value in read_record(folder / "out")["entries"].values():
        entry = read_entry(value)
        assert entry
        assert (entry.verb, entry.status) == ("scale", "written")
    record = BatchRecord.read(folder / "out")
    before = (folder / "out" / RECORD_NAME).read_bytes()
    record.write()
    assert (folder / "out" / RECORD_NAME).read_bytes() == before


def test_a_digest_tells_files_apart_by_names_and_by_where_they_end(tmp_path: Path) -> None:
    contents = [{"a": b"12", "b": b"3"}, {"a": b"1", "b": b"23"}, {"b": b"12", "c": b"3"}, {"a": b"123"}]
    digests = set()
    for number, files in enumerate(contents):
        (tmp_path / str(number)).mkdir()
        for name, content in files.items():
            (tmp_path / str(number) / name).write_bytes(content)
        digests.add(files_digest(sorted((tmp_path / str(number)).iterdir())))
    assert len(digests) == len(contents)
