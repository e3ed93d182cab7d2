"""Targets: what is read is never replaced, and --overwrite removes nothing that loralens did not write."""

import json
import os
import shutil
from pathlib import Path

import pytest

import loralens
from tests.bases import contents, record_in, sharded, tensors
from tests.cli.test_merge import CERTIFICATE, UNDO, done, refused, run


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs/a``, an adapter among other runs; ``models/base`` and ``models/merged`` of it; ``lone``, one file."""
    folder = tmp_path_factory.mktemp("made") / "home"
    shutil.copytree(small, folder / "runs" / "a")
    shutil.copytree(small, folder / "runs" / "b")
    (folder / "runs" / "notes.txt").write_text("years")
    sharded(folder / "models" / "base", tensors())
    shutil.copytree(folder / "models" / "base", folder / "models" / "tuned")
    done("merge", small, "--base", folder / "models" / "base", "-o", folder / "models" / "merged")
    (folder / "lone").mkdir()
    loralens.save(loralens.load(small), folder / "lone" / "x.safetensors", format="kohya")
    (folder / "undo").mkdir()
    shutil.copy(folder / "models" / "merged" / UNDO, folder / "undo" / "u")
    (folder / "link").symlink_to("runs/a")
    (folder / "texts").mkdir()
    (folder / "texts" / "t.txt").write_text("one\ntwo\n")
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `made`, which is the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "home", symlinks=True))
    return tmp_path / "home"


B = ("--base", "models/base")
MERGE = ("merge", "runs/a", *B)
UNMERGE = ("unmerge", "models/merged")
TARGETS = [
    (MERGE, "runs", "holds the adapter runs/a"),
    (MERGE, "runs/a/merged", "lies within the adapter runs/a"),
    (MERGE, "link", "is the adapter runs/a itself"),
    (MERGE, ".", "holds the base"),
    (MERGE, "models/base/x", "lies within the base"),
    (MERGE, "runs/notes.txt", "is a file, but the base is a folder"),
    (("merge", "link", *B), "runs", "holds the adapter link"),
    (("merge", "runs/b:0.5", "runs/a/adapter_model.safetensors", *B), "runs/a", "holds the adapter runs/a/adapter_mo"),
    ((*MERGE, "--undo", "models/base/u"), "out", "lies within the base"),
    ((*MERGE, "--undo", "runs/notes.txt"), "out", "exists, and is not an undo file"),
    ((*MERGE, "--certificate", "runs/a/adapter_config.json"), "out", "lies within the adapter runs/a"),
    ((*MERGE, "--certificate", "runs/notes.txt"), "out", "exists, and is not a certificate"),
    ((*MERGE, "--undo", "x", "--certificate", "./x"), "out", "is given for both the undo file and the certificate"),
    ((*MERGE, "--undo", "out"), "out", "is the merged model itself"),
    ((*MERGE, "--undo", "out/config.json"), "out", "is a file of the model"),
    (UNMERGE, "models/merged", "is the merged model itself"),
    ((*UNMERGE, "--undo", "undo/u"), "undo", "holds the undo file"),
    ((*UNMERGE, "--adapter", "runs/a"), "runs", "holds the adapter runs/a"),
    (("extract", *B, "--tuned", "models/merged", "--rank", "2"), "models/merged", "is the tuned model itself"),
    (("extract", *B, "--tuned", "models/merged", "--rank", "2"), "models/base/x.safetensors", "lies within the base"),
    (("convert", "runs/a", "--to", "peft"), "link", "is where the source is"),
    (("convert", "runs/a", "--to", "peft", *B), "models/base/x", "lies within the base"),
    (("convert", "lone/x.safetensors", "--to", "peft", *B), "lone", "is where the source is"),
    (("compress", "runs/a", "--rank", "1"), "runs", "holds the adapter runs/a"),
    (("combine", "runs/a", "runs/b"), "runs/b/x", "lies within the adapter runs/b"),
    (("drop", "runs/a", "-m", "q_proj"), "runs", "holds the adapter runs/a"),
    (("intruders", "runs/a", *B, "--remove", "0"), "models/base", "is the base itself"),
]


@pytest.mark.some(12)
@pytest.mark.parametrize(("command", "output", "message"), TARGETS, ids=lambda part: str(part)[:60])
def test_what_is_read_is_never_replaced(command: tuple[str, ...], output: str, message: str, home: Path) -> None:
    before = contents(home)
    answer = run(*command, "-o", output, "--overwrite")
    assert answer.exit_code != 0
    assert message in answer.stderr
    assert answer.stderr.count("error: ") == 1
    assert contents(home) == before
    assert (home / "link").is_symlink()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("models/base", "is the model itself"),
        ("models", "holds the model"),
        ("models/base/x", "lies within the model"),
        ("texts", "holds the texts"),
    ],
)
def test_a_run_of_training_replaces_nothing_it_reads(output: str, message: str, home: Path) -> None:
    (home / output).mkdir(exist_ok=True)
    (home / output / "run.json").write_text("{}")  # as if it were a run
    before = contents(home)
    command = ("train", "--model", "models/base", "--task", "causal-lm", "--data", "texts/t.txt", "--rank", "1")
    said = refused(*command, "-o", output, "--overwrite")
    assert message in said or "would be lost" in said
    assert contents(home) == before


def test_a_report_is_not_written_over_what_it_is_of(home: Path) -> None:
    shutil.copy("lone/x.safetensors", "lone/page.html")
    shutil.copytree("runs/a", "pictures_files/deep.png")
    before = contents(home)
    assert "is lone/page.html itself" in refused("report", "lone/page.html", "-o", "lone/page.html", "--overwrite")
    refused("report", "pictures_files/deep.png", "-o", "pictures.html", "--markdown", "--overwrite")
    assert contents(home) == before


def test_targets_beside_the_inputs_are_fine(home: Path) -> None:
    done("convert", "lone/x.safetensors", "--to", "kohya", "-o", "lone/y.safetensors")
    done("convert", "runs/a", "--to", "peft", "-o", "runs/c")
    done("convert", "runs/a", "--to", "peft", "-o", "runs/c", "--overwrite")
    done("merge", "runs/a", *B, "-o", "runs/merged")
    done("merge", "runs/a", *B, "-o", "models/merged", "--overwrite")
    assert (home / "runs" / "notes.txt").read_text() == "years"


def other_base(home: Path, shards: int = 2) -> Path:
    base = sharded(home / "other", tensors(seed=3), shards=shards)
    (base / "vocab.txt").write_text("a")
    (base / "code").mkdir()
    (base / "code" / "model.py").write_text("x = 1")
    return base


STRANGERS = ["mine.txt", ".git/HEAD", "checkpoint-1/model.safetensors"]


@pytest.mark.some(5)
@pytest.mark.parametrize("verb", ["merge", "unmerge", "unmerge --adapter"])
@pytest.mark.parametrize("name", STRANGERS)
def test_what_others_put_there_is_named_and_stays(name: str, verb: str, home: Path) -> None:
    done(*MERGE, "-o", "out")
    stranger = home / "out" / name
    stranger.parent.mkdir(parents=True, exist_ok=True)
    stranger.write_text("mine")
    before = contents(home)
    command = {"merge": MERGE, "unmerge": UNMERGE, "unmerge --adapter": (*UNMERGE, "--adapter", "runs/a")}[verb]
    assert f"out: holds files that no merge wrote and the new model does not have: {name}\n  fix: " in refused(
        *command, "-o", "out", "--overwrite"
    )
    assert contents(home) == before
    stranger.unlink()
    done(*command, "-o", "out", "--overwrite")


def test_what_a_merge_wrote_is_known_by_its_certificate(home: Path) -> None:
    """Another base in other shards, with other files: all that is gone afterwards was written by loralens."""
    other = other_base(home)
    done("merge", "runs/a", "--base", other, "-o", "out")
    listed = record_in(home / "out" / CERTIFICATE)["files"]
    there = {name: len(data) for name, data in contents(home / "out").items()}
    assert listed == {name: size for name, size in there.items() if name != CERTIFICATE}
    assert "code/model.py" in listed
    done(*MERGE, "-o", "out", "--overwrite")
    assert contents(home / "out").keys() == contents(home / "models" / "merged").keys()


@pytest.mark.parametrize("change", ["changed", "no certificate", "no list", "a list of nothing"])
def test_what_was_changed_since_or_is_not_listed_stays(change: str, home: Path) -> None:
    done("merge", "runs/a", "--base", other_base(home), "-o", "out")
    out, lost = home / "out", "code/model.py"
    certificate = record_in(out / CERTIFICATE)
    if change == "changed":
        (out / "vocab.txt").write_text("my own vocabulary")
        lost = "vocab.txt"
    elif change == "no certificate":
        (out / CERTIFICATE).unlink()
    else:
        certificate["files"] = {"no list": None, "a list of nothing": {"../runs/notes.txt": 5, "x": "y"}}[change]
        (out / CERTIFICATE).write_text(json.dumps(certificate))
    before = contents(home)
    assert f"the new model does not have: {lost}" in refused(*MERGE, "-o", "out", "--overwrite")
    assert contents(home) == before


def test_a_certificate_names_no_file_elsewhere(home: Path) -> None:
    done(*MERGE, "-o", "out")
    certificate = record_in(home / "out" / CERTIFICATE)
    certificate["files"] |= {"../runs/notes.txt": 5, str(home / "runs" / "notes.txt"): 5}
    (home / "out" / CERTIFICATE).write_text(json.dumps(certificate))
    done(*MERGE, "-o", "out", "--overwrite")
    assert (home / "runs" / "notes.txt").read_text() == "years"


def test_undo_file_and_certificate_within_the_target(home: Path) -> None:
    """They go into the new folder: the old one is gone in the end."""
    places = ("--undo", "out/deep/u", "--certificate", "out/c.json")
    done(*MERGE, "-o", "out", *places)
    assert {"deep/u", "c.json"} <= contents(home / "out").keys()
    done("merge", "runs/a:2", *B, "-o", "out", *places, "--overwrite")
    done("unmerge", "out", "--undo", "out/deep/u", "-o", "back")
    assert contents(home / "back").items() >= contents(home / "models" / "base").items()
    assert record_in(home / "out" / "c.json")["adapters"][0]["weight"] == 2
    done(*MERGE, "-o", "out", "--overwrite")  # both are known by what is in them
    assert {"deep/u", "c.json"}.isdisjoint(contents(home / "out"))


def test_the_current_directory_and_mount_points_are_not_replaced(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done(*MERGE, "-o", "out")
    adapter, base = home / "runs" / "a", home / "models" / "base"
    monkeypatch.chdir(home / "out")
    answer = run("merge", adapter, "--base", base, "-o", home / "out", "--overwrite")
    assert "out: cannot be replaced: the current directory is in it" in answer.stderr
    answer = run("merge", adapter, "--base", base, "-o", ".", "--overwrite")
    assert "cannot be replaced: the current directory is in it" in answer.stderr
    monkeypatch.chdir(home)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    answer = run(*MERGE, "-o", "out", "--overwrite")
    assert "out: cannot be replaced: a disk is mounted there" in answer.stderr
