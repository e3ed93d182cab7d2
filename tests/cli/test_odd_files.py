"""What a command reads may be a pipe without a writer, an endless device, a link to itself, or a folder."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result

import loralens
from loralens.verbs.models.texts import read_texts
from tests import models
from tests.bases import sharded, tensors
from tests.cli.command import Command, main
from tests.formats.blobs import limits

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")

KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a folder": Path.mkdir,
}
# Names of parameters whose place is written to, or is a folder that may be empty.
NOT_READ = {"output", "plot", "sarif", "report", "certificate", "cache", "fleet"}
# Commands that do not look at a base where the adapter needs none, and that look through an empty folder.
MAY_SUCCEED = {
    *(
        (command, "base")
        for command in ("compress", "curve", "drop", "equal", "interpolate", "negate", "scale", "subtract")
    ),
    *(("survey", "folder"), ("fleet", "folder"), ("merge", "undo")),
}
TEXTS_OR_FILES = {"evaluations", "weights"}
# The suffix decides how these are read.
SUFFIXES = {"data": ".jsonl", "eval": ".jsonl", "general": ".jsonl", "recipe": ".toml", "evaluations": ".json"}
# Further options that each command needs.
OPTIONS = {
    "compress": ("--rank", "1"),
    "extract": ("--rank", "1"),
    "convert": ("--to", "mlx"),
    "scale": ("--by", "2"),
    "interpolate": ("--at", "0.5"),
    "drop": ("-m", "*.0.*"),
    "train": ("--rank", "1"),
    "evaluate": ("--task", "causal-lm"),
}


def commands(command: click.Command, *words: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name in command.list_commands(click.Context(command)):
        inner = command.get_command(click.Context(command), name)
        assert inner
        yield from commands(inner, *words, name)


def is_read(param: click.Parameter) -> bool:
    """Whether a parameter names a file or folder that is read."""
    if param.name in NOT_READ:
        return False
    return type(param.type).__name__ == "PathType" or param.name in TEXTS_OR_FILES


CASES = [
    pytest.param(
        words,
        command,
        param,
        id=f"{' '.join(words)} {param.opts[0]}",
        marks=[pytest.mark.slow] if words == ("evaluate",) else [],  # it imports torch first
    )
    for words, command in commands(main)
    if words != ("demo",)  # it writes the adapters that it reads
    for param in command.params
    if is_read(param)
]


@pytest.fixture(scope="module")
def valid(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A valid value of every parameter that some command requires."""
    home = tmp_path_factory.mktemp("odd")
    texts = home / "t.jsonl"
    texts.write_text('{"text": "a b", "label": "x"}\n{"text": "c d", "label": "y"}\n')
    base = str(sharded(home / "base", tensors()))
    adapters = dict.fromkeys(("adapters", "adapter", "source", "first", "second"), str(small))
    names = dict.fromkeys(("name", "file"), "none") | {"sql": "SELECT 1"}
    return {**adapters, **names, **dict.fromkeys(("base", "tuned", "model", "merged"), base), "data": str(texts)}


def ran(*args: object) -> Result:
    """A command that ends soon and takes little memory, whatever it reads."""
    with no_waiting(), limits(60, 1 << 30):
        return Command().run(*args)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail if the block waits for ever, as opening a pipe does: this takes no processor time."""

    def too_late(*_: Any) -> None:
        raise TimeoutError("still waiting")

    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.some(60)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("words", "command", "param"), CASES)
def test_every_file_that_a_command_is_given(
    words: tuple[str, ...],
    command: click.Command,
    param: click.Parameter,
    kind: str,
    valid: dict[str, str],
    tmp_path: Path,
) -> None:
    odd = tmp_path / f"odd{SUFFIXES.get(str(param.name), '.safetensors')}"
    KINDS[kind](odd)
    args = [*words, *OPTIONS.get(words[0], ())]
    for other in command.params:
        if other is param or (other.required and other.opts[0] not in args) or other.name == "output":
            value = odd if other is param else tmp_path / "out" if other.name == "output" else valid[str(other.name)]
            args += [str(value)] if isinstance(other, click.Argument) else [other.opts[0], str(value)]
    done = ran(*args)
    if (words[0], param.name) in MAY_SUCCEED and done.exit_code == 0:
        return
    check_refused(done)


def check_refused(done: Result) -> None:
    assert isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == 2, done.output
    assert "fix: " in done.output or "error: " in done.output


# A command, and a file in a folder that it reads: {a} is the folder of an adapter, {b} of a base, {m} of a merged
# model, {r} of a run, {l} a pickle with its record.
INSIDE = [
    ("inspect {a}", "a/adapter_model.safetensors"),
    ("inspect {a}", "a/adapter_config.json"),
    ("doctor {a} --base {b}", "b/config.json"),
    ("merge {a} --base {b} -o {o}", "b/config.json"),
    ("merge {a} --base {b} -o {o}", "b/model.safetensors.index.json"),
    ("merge {a} --base {b} -o {o}", "b/model-00001-of-00003.safetensors"),
    ("spectrum {a} --base {b}", "b/quantize_config.json"),
    ("unmerge {m} -o {o}", "m/undo.loralens"),
    ("verify {m}", "m/merge_certificate.json"),
    ("inspect {l}", "l/loralens.json"),
    ("trajectory {r}", "r/checkpoint-1/trainer_state.json"),
    ("trajectory {r}", "r/checkpoint-1/adapter_model.safetensors"),
    ("trajectory {r}", "r/log.jsonl"),
    ("report {a} --evaluations {r}/e.json -o {o}.html", "r/e.json"),
]


@pytest.fixture(scope="module")
def home(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inside") / "home"
    shutil.copytree(small, home / "a")
    for step in (1, 2):
        shutil.copytree(small, home / "r" / f"checkpoint-{step}")
    sharded(home / "b", tensors())
    loralens.merge(home / "a", base=home / "b", output=home / "m")
    loralens.convert(home / "a", output=home / "l" / "lora.bin", to="loralib")
    return home


@pytest.mark.some(20)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("command", "name"), INSIDE)
def test_every_file_in_a_folder_that_a_command_is_given(
    command: str, name: str, kind: str, home: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(home, tmp_path / "home")
    odd = here / name
    odd.parent.mkdir(exist_ok=True)
    odd.unlink(missing_ok=True)
    KINDS[kind](odd)
    words = {each: here / each for each in ("a", "b", "m", "l", "r", "o")}
    check_refused(ran(*(word.format_map(words) for word in command.split())))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["a pipe", "an endless device"])
def test_what_other_libraries_open_is_looked_at_before(name: str, kind: str, tmp_path: Path) -> None:
    folder = models.folder(models.llama(), tmp_path / "model")
    (folder / name).unlink()
    KINDS[kind](folder / name)
    texts = models.jsonl(tmp_path / "t.jsonl")
    done = ran("evaluate", "--model", folder, "--data", texts, "--task", "causal-lm")
    check_refused(done)
    assert f"{name}: is not a regular file" in done.output


def test_a_data_set_with_a_pipe(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "dataset_info.json").write_text("{}")
    os.mkfifo(folder / "state.json")
    with no_waiting(), pytest.raises(loralens.FormatError, match=r"state\.json: is not a regular file"):
        read_texts(folder)
